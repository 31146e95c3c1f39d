"""The mode `search`: how often cheaper searches find what TempCache's exact one finds, on the slots of real commits.

The cache fills by commits of real motion, TempCache merging as it is configured. In its last commits every search for
partners is done again by each of `SEARCHES`, for some of the slots that look for one, and the two answers are held
against each other: the expected squared logit change of the pair, with its value term (`fastar.cache.tempcache`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.ann import ExactMatcher, LSHMatcher, Matcher, QuantizedMatcher
from fastar.ann.base import Excluded, Metric, seeded_planes
from fastar.ann.lsh import mean_key
from fastar.ann.similarity import random_directions
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.workload import Variant, Workload, open_workload, variants_of
from fastar.cache import TempCache
from fastar.cache.fused import FusedSlots, match

Search = Callable[[Tensor, Tensor], Tensor]
"""Queries [N, n, F] and keys [N, m, F] -> index [N, n] of the key found, -1 where none is."""

NEAR = 0.5  # share of the slots, those with the nearest partners, of which most merges are made


def run_search(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `search`: rows method, budget, search, queries, and what `Judged.rows` says.

    Raises:
        ValueError: a method without a TempCache, one without full features to search by, or too short a recording.
    """
    for variant in variants_of(config):
        _searching(variant)  # what cannot be looked at says so before anything is opened
    chunk, asked = config.backbone.chunk_frames, config.search
    frames = chunk * -(-asked.frames // chunk)
    workload = open_workload(config, page, latent_frames=frames)
    page.card(
        {"backbone": workload.session.backbone.config.name, "layers": workload.layers, "weights": workload.weights,
         "contents": workload.contents.about, "frames": frames, "commits": asked.commits, "share": asked.share},
        f"{workload.session.backbone.config.name} of {workload.layers} layers, {workload.weights} weights: the last "
        f"{asked.commits} commits of {frames} latent frames of {workload.contents.about}, {asked.share:.0%} of the "
        f"slots that look for a partner.",
    )  # fmt: skip
    rows: Rows = []
    for variant in workload.variants:
        judged = _watched(workload, variant, frames, asked)
        rows += [{"method": variant.name, "budget": variant.budget, **row} for row in judged.rows()]
    page.show([_text(row) for row in rows], "searches for partners, against the exact one")
    return rows, {}


class Judged(Matcher):
    """A matcher that, while `active`, holds all `SEARCHES` against the exact answer to what it is asked.

    Args:
        inner: answers.
        frame: tokens of a latent frame.
        share: of the queries that are judged, drawn by a fixed seed.
    """

    def __init__(self, inner: Matcher, frame: int, share: float) -> None:
        self.inner, self.frame, self.share, self.active = inner, frame, share, False
        self._found: dict[str, _Found] = {}

    def exact(self) -> Matcher:
        return self.inner.exact()

    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        valid: Tensor | None = None,
        excluded: Excluded | None = None,
        metric: Metric = "dot",
    ) -> tuple[Tensor, Tensor]:
        if self.active and valid is None and excluded is None:
            self._judge(queries.float(), keys.float())
        return self.inner.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)

    def rows(self) -> Rows:
        """Rows search, queries, and of the queries:

        found: share with any answer; best: share whose answer is as good as the exact one; best_near: the same of the
        half whose best partners are nearest; excess: distance to the answers over that to the best, minus 1, of those
        with an answer; excess_near: that of the nearer half.
        """
        return [{"search": name, **found.row()} for name, found in self._found.items()]

    def _judge(self, queries: Tensor, keys: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        number = max(1, round(self.share * queries.shape[1]))
        rows = torch.randperm(queries.shape[1], generator=generator)[:number].sort().values.to(queries.device)
        some = queries[:, rows]
        index, _ = ExactMatcher().nearest(some, keys, metric="euclidean")
        best = _distance(some, keys, index)
        answers = {name: search(some, keys) for name, search in SEARCHES.items()}
        if queries.device.type == "cuda":
            for width in (None, *WIDTHS):
                answers[f"fused kernel{_along(width)}"] = _fused(queries, keys, self.frame, width)[:, rows]
        for name, found in answers.items():
            self._found.setdefault(name, _Found()).add(_distance(some, keys, found), best, found >= 0)


@dataclass
class _Found:
    """Sums over the queries judged; the second of each pair over the nearer half."""

    queries: list[int] = field(default_factory=lambda: [0, 0])
    found: int = 0
    best: list[int] = field(default_factory=lambda: [0, 0])
    distance: list[float] = field(default_factory=lambda: [0.0, 0.0])
    least: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, distance: Tensor, best: Tensor, found: Tensor) -> None:
        """Of squared distances [N, n] to the answer and to the exact one, and whether there is an answer."""
        near = best <= best.quantile(NEAR, dim=1, keepdim=True)
        self.found += int(found.sum())
        for part, chosen in enumerate((torch.ones_like(near), near)):
            self.queries[part] += int(chosen.sum())
            self.best[part] += int((chosen & found & (distance <= best)).sum())
            answered = chosen & found
            self.distance[part] += float(distance[answered].sum())
            self.least[part] += float(best[answered].sum())

    def row(self) -> dict[str, Any]:
        all_of, near = self.queries
        excess = [
            mine / least - 1 if least else 0.0 for mine, least in zip(self.distance, self.least, strict=True)
        ]
        return {
            "queries": all_of,
            "found": self.found / all_of,
            "best": self.best[0] / all_of,
            "best_near": self.best[1] / near,
            "excess": excess[0],
            "excess_near": excess[1],
        }


def _distance(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Squared distance of queries [N, n, F] to the keys at `index` [N, n], of the pair itself: float64 [N, n]."""
    chosen = keys.gather(1, index.long().clamp_min(0)[..., None].expand(-1, -1, keys.shape[2]))
    return (queries - chosen).double().square().sum(-1)


def _exact(width: int | None, dtype: torch.dtype) -> Search:
    """Exact search along `width` random directions, those of `match_width`, of features rounded to `dtype`."""

    def search(queries: Tensor, keys: Tensor) -> Tensor:
        sides = (_searched(x, width).to(dtype).float() for x in (queries, keys))
        return ExactMatcher().nearest(*sides, metric="euclidean")[0]

    return search


def _by(matcher: Matcher) -> Search:
    return lambda queries, keys: matcher.nearest(queries, keys, metric="euclidean")[0]


def _signs(bits: int) -> Search:
    """Least Hamming distance of sign codes, as `TritonBinaryMatcher` finds it, by products of signs on any device."""

    def search(queries: Tensor, keys: Tensor) -> Tensor:
        centre, planes = mean_key(keys, None), seeded_planes(0, keys.shape[2], bits, like=keys)
        sides = (torch.where((x - centre) @ planes > 0, 1.0, -1.0) for x in (queries, keys))
        return ExactMatcher().nearest(*sides)[0]

    return search


def _fused(queries: Tensor, keys: Tensor, frame: int, width: int | None) -> Tensor:
    """What the kernel of fused commits finds for slots before those that entered: index int64 [N, n]."""
    features = torch.cat([queries, keys], 1)
    searched = _searched(features, width).bfloat16().contiguous()
    offset, count = searched.float().square().sum(-1) * -0.5, features.new_ones(features.shape[:2])
    slots = FusedSlots(searched, searched, offset, count)
    nobody = torch.full(features.shape[:2], -1, dtype=torch.int32, device=features.device)
    with torch.cuda.device_of(features):
        partner, _ = match(slots, nobody, queries.shape[1], frame, "none")
    found = partner[:, : queries.shape[1]].long()
    return torch.where(found < 0, -1, found - queries.shape[1])


def _searched(features: Tensor, width: int | None) -> Tensor:
    if width is None:
        return features
    return features @ random_directions(0, features.shape[2], width, features.device)


def _along(width: int | None) -> str:
    return "" if width is None else f", {width} directions"


WIDTHS = (64, 32, 16)
SEARCHES: dict[str, Search] = {
    "exact, bfloat16": _exact(None, torch.bfloat16),
    **{f"exact, bfloat16{_along(width)}": _exact(width, torch.bfloat16) for width in WIDTHS},
    "LSH, 8 tables of 8 bits": _by(LSHMatcher()),
    "int8 codes": _by(QuantizedMatcher(bits=8)),
    "sign codes of 256 bits": _signs(256),
}
"""By the name of its row; LSH probes all codes one bit off, as conf/ann/lsh.yaml does."""


def _searching(variant: Variant) -> TempCache:
    """A fresh cache of a method whose searches can be looked at."""
    cache = variant.method.cache()
    if not isinstance(cache, TempCache) or cache.match_width is not None or cache.commit_by != "plain":
        raise ValueError(
            f"mode=search looks at the searches of plain commits by full features, which '{variant.name}' has not: "
            "set method=[tempcache]"
        )
    return cache


def _watched(workload: Workload, variant: Variant, frames: int, asked: DictConfig) -> Judged:
    """Commit `frames` latent frames by a method, its last commits judged."""
    cache = _searching(variant)
    tokens = workload.session.backbone.config.tokens_per_frame
    judged = cache.matcher = Judged(cache.matcher, tokens, asked.share)
    rollout, _ = workload.start(variant, capture=False, cache=cache)
    chunk = workload.session.chunk
    while rollout.next_frame < frames:
        judged.active = rollout.next_frame >= frames - asked.commits * chunk
        rollout.commit(workload.truth(rollout), workload.actions(rollout))
    if not judged.rows():
        raise ValueError(f"nothing was searched in the last commits of {frames} frames: raise search.frames")
    return judged


def _text(row: dict[str, Any]) -> dict[str, str]:
    return {
        "budget": f"{row['budget']:g}",
        "search": row["search"],
        "found": f"{row['found']:.3f}",
        "best": f"{row['best']:.3f}",
        "best, nearer half": f"{row['best_near']:.3f}",
        "excess": f"{row['excess']:.1%}",
        "excess, nearer half": f"{row['excess_near']:.1%}",
    }
