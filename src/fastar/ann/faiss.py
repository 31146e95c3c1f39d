"""Nearest neighbours by FAISS (Douze et al. 2024): flat, or inverted lists, on the CPU or on a GPU build."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from fastar.ann.base import Excluded, Matcher, Metric, check_features
from fastar.ann.exact import ExactMatcher, no_match


class FaissMatcher(Matcher):
    """One FAISS index a problem, built and searched at every call.

    Features go through host memory, so on a GPU this synchronises; it is the paper's named tool and a second opinion
    on `ExactMatcher`, not the fast path.

    Args:
        index: `flat` (exact) or `ivf` (k-means cells, of which the nearest few are searched).
        cells: cells of `ivf`; capped at one for every 39 keys, below which FAISS deems training unsound.
        probes: cells searched of `ivf`.

    Raises:
        ValueError: if FAISS is not installed.
    """

    def __init__(self, *, index: Literal["flat", "ivf"] = "flat", cells: int = 32, probes: int = 4) -> None:
        if index not in ("flat", "ivf"):
            raise ValueError(f"unknown FAISS index {index!r}: choose flat or ivf")
        self.index, self.cells, self.probes = index, cells, probes
        try:
            self._faiss: Any = import_module("faiss")
        except ImportError as error:
            raise ValueError(
                "ann=faiss needs FAISS: install faiss-cpu (or faiss-gpu), or choose ann=exact"
            ) from error

    def exact(self) -> Matcher:
        return ExactMatcher()

    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        valid: Tensor | None = None,
        excluded: Excluded | None = None,
        metric: Metric = "dot",
    ) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        if excluded is not None:
            raise ValueError("FAISS cannot leave out other keys for each query: choose ann=exact")
        index, score = no_match(queries)
        for problem in range(queries.shape[0]):
            pool = torch.arange(keys.shape[1], device=keys.device)
            if valid is not None:
                pool = pool[valid[problem]]
            if len(pool) and queries.shape[1]:
                found, value = self._search(queries[problem], keys[problem, pool], metric)
                hit = found >= 0
                index[problem] = torch.where(hit, pool[found.clamp_min(0)], -1)
                score[problem] = torch.where(hit, value, -torch.inf)
        return index, score

    def _search(self, queries: Tensor, keys: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        points = keys.detach().float().cpu().contiguous().numpy()
        built = self._build(points.shape, metric)
        if not built.is_trained:
            built.train(points)
        built.add(points)
        value, found = built.search(queries.detach().float().cpu().contiguous().numpy(), 1)
        score = torch.from_numpy(value[:, 0]).to(queries)
        return torch.from_numpy(found[:, 0]).to(queries.device), -score if metric == "euclidean" else score

    def _build(self, shape: tuple[int, int], metric: Metric) -> Any:
        count, width = shape
        flat = self._faiss.IndexFlatL2(width) if metric == "euclidean" else self._faiss.IndexFlatIP(width)
        cells = min(self.cells, count // 39)
        if self.index == "flat" or cells < 2:
            return flat
        kind = self._faiss.METRIC_L2 if metric == "euclidean" else self._faiss.METRIC_INNER_PRODUCT
        built = self._faiss.IndexIVFFlat(flat, width, cells, kind)
        built.nprobe = min(self.probes, cells)
        return built
