"""The two things approximate nearest-neighbour search is used for: matching and bucketing.

A `Matcher` answers "which key is nearest to this query" (TempCache); a `Bucketizer` gives queries and keys a bucket
each so that near ones tend to share it (AnnCA, AnnSA). Both work on folded batches: N is any number of independent
problems side by side, usually batch x heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["dot", "euclidean"]

Excluded = tuple[Tensor, Tensor]
"""Keys low .. high - 1 that each query may not match: low and high integers [N or 1, n]."""


class Matcher(ABC):
    """Top-1 search. Deterministic: of equally good keys the first one wins."""

    @abstractmethod
    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        valid: Tensor | None = None,
        excluded: Excluded | None = None,
        metric: Metric = "dot",
    ) -> tuple[Tensor, Tensor]:
        """The best key of every query.

        Args:
            queries: [N, n, d] features (see `fastar.ann.similarity` for the maps that make them).
            keys: [N, m, d] features.
            valid: bool [N, m], keys that may be returned; None means all.
            excluded: a range of keys for every query, as those of its own frame, that may not be returned.
            metric: `dot` maximises the inner product, `euclidean` minimises the squared distance.

        Returns:
            index: int64 [N, n] into the keys, -1 where no key was found.
            score: float [N, n], the inner product or minus the squared distance as this search saw it; -inf where
            no key was found.

        Raises:
            ValueError: if shapes do not belong together, or the search cannot do what is asked for.
        """

    @abstractmethod
    def exact(self) -> Matcher:
        """The search to use beside this one where no key may be passed over, on the same devices."""


class Bucketizer(ABC):
    """Assigns content buckets. Deterministic for a seed."""

    @abstractmethod
    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Buckets of queries [N, n, d] and keys [N, m, d] as int64 [N, n] and [N, m], from 0 to 2^16 - 1.

        Ids are comparable within one of the N problems only. Keys that are not `valid` [N, m] change no other bucket,
        and theirs mean nothing; None: all are.
        """


def check_features(queries: Tensor, keys: Tensor, valid: Tensor | None = None) -> None:
    """Raise a ValueError unless queries [N, n, d], keys [N, m, d] and valid [N, m] belong together."""
    if queries.dim() != 3 or keys.dim() != 3:
        raise ValueError(
            f"queries and keys must be [N, n, d] and [N, m, d], got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queries.shape[0] != keys.shape[0] or queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must agree in their first and last size"
        )
    if valid is not None and valid.shape != keys.shape[:2]:
        raise ValueError(f"valid must be {tuple(keys.shape[:2])}, one flag a key, got {tuple(valid.shape)}")


def key_offset(keys: Tensor, valid: Tensor | None, metric: Metric) -> Tensor:
    """What [N, m] is added to q.k to rank keys: |q - k|^2 = |q|^2 - 2 (q.k - |k|^2 / 2); -inf for those not valid."""
    offset = torch.zeros_like(keys[..., 0]) if metric == "dot" else keys.square().sum(-1) * -0.5
    return offset if valid is None else offset.masked_fill(~valid, -torch.inf)


def exclude(score: Tensor, excluded: Excluded | None, part: slice) -> Tensor:
    """Scores [N, queries of `part`, m], in place -inf for the keys that a query may not match."""
    if excluded is None:
        return score
    low, high = (side[:, part, None] for side in excluded)
    index = torch.arange(score.shape[2], device=score.device)
    return score.masked_fill_((index >= low).logical_and_(index < high), -torch.inf)


def found_from(
    best: Sequence[tuple[Tensor, Tensor]], queries: Tensor, metric: Metric
) -> tuple[Tensor, Tensor]:
    """What `Matcher.nearest` returns, from (score, index) of blocks of queries, the scores as `key_offset` says."""
    score, index = (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    if metric == "euclidean":
        score = (2 * score - queries.square().sum(-1)).clamp_max(0)
    return torch.where(score == -torch.inf, -1, index), score


def seeded_normal(seed: int, *shape: int, like: Tensor) -> Tensor:
    """Standard normal numbers that depend on the seed and the shape only, on the device and in the dtype of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(like)


def seeded_planes(seed: int, rows: int, columns: int, *, like: Tensor) -> Tensor:
    """`seeded_normal` of a few numbers that are wanted again and again: the last are kept, and must not be written to.

    A copy to the GPU in every call would make the host wait.
    """
    return _planes(seed, rows, columns, like.dtype, like.device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # for callers of either mode
def _planes(seed: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return seeded_normal(seed, rows, columns, like=torch.empty(0, dtype=dtype, device=device))
