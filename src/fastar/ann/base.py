"""The two things approximate nearest-neighbour search is used for: matching and bucketing.

A `Matcher` answers "which key is nearest to this query" (TempCache); a `Bucketizer` gives queries and keys a bucket
each so that near ones tend to share it (AnnCA, AnnSA). Both work on folded batches: N is any number of independent
problems side by side, usually batch x heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["dot", "euclidean"]


class Matcher(ABC):
    """Top-1 search. Deterministic: of equally good keys the first one wins."""

    @abstractmethod
    def nearest(
        self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None, metric: Metric = "dot"
    ) -> tuple[Tensor, Tensor]:
        """The best key of every query.

        Args:
            queries: [N, n, d] features (see `fastar.ann.similarity` for the maps that make them).
            keys: [N, m, d] features.
            valid: bool [N, m], keys that may be returned; None means all.
            metric: `dot` maximises the inner product, `euclidean` minimises the squared distance.

        Returns:
            index: int64 [N, n] into the keys, -1 where no key was found.
            score: float [N, n], the inner product or minus the squared distance as this search saw it; -inf where
            no key was found.
        """


class Bucketizer(ABC):
    """Assigns content buckets. Deterministic for a seed."""

    @abstractmethod
    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Buckets of queries [N, n, d] and keys [N, m, d] as int64 [N, n] and [N, m].

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
