"""Locality-sensitive hashing with random hyperplanes (paper section 1, "ANN matching", LSH)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import (
    Bucketizer,
    Excluded,
    Matcher,
    Metric,
    check_features,
    exclude,
    found_from,
    key_offset,
    seeded_planes,
)
from fastar.ann.codes import sign_codes
from fastar.ann.exact import ExactMatcher, no_match


class LSHMatcher(Matcher):
    """Top-1 among the keys whose sign pattern under random hyperplanes is the query's, or near it, in any table.

    Keys are hashed about their mean: signs about the origin would put keys that share a mean into one bucket. Patterns
    are compared by matrix products of signs, so that it runs anywhere; it shows what hashing costs in recall, and is
    no faster than `ExactMatcher`.

    Args:
        bits: hyperplanes a table, 1 to 30; a table has 2^bits buckets.
        tables: independent tables; a key is a candidate if any table agrees.
        radius: bits of a pattern that may differ (0: the query's own bucket; 1: and all its neighbours).
        seed: of the hyperplanes.
        max_scores: how many scores are held at a time; more queries than that allows are taken in blocks.
    """

    def __init__(
        self, *, bits: int = 8, tables: int = 8, radius: int = 1, seed: int = 0, max_scores: int = 2**26
    ) -> None:
        check_lsh(bits, tables, radius)
        self.bits, self.tables, self.radius, self.seed, self.max_scores = (
            bits,
            tables,
            radius,
            seed,
            max_scores,
        )

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
        if keys.shape[1] == 0 or queries.shape[1] == 0:
            return no_match(queries)
        centre = mean_key(keys, valid)
        planes = seeded_planes(self.seed, keys.shape[2], self.tables * self.bits, like=keys)
        key_signs = self._signs(keys - centre, planes)
        # q.k ranks keys as q.(k - centre) does: only a distance moves the queries too
        query_signs = self._signs(queries - centre if metric == "euclidean" else queries, planes)
        offset = key_offset(keys, valid, metric)

        block = max(1, self.max_scores // (queries.shape[0] * self.tables * keys.shape[1]))
        best = []
        for start in range(0, queries.shape[1], block):
            part = slice(start, start + block)
            # bits - 2 * differing bits, best table: [N, n, m]
            agreement = (query_signs[:, :, part] @ key_signs.mT).amax(1)
            score = torch.baddbmm(offset[:, None], queries[:, part], keys.mT)
            score = score.masked_fill(agreement < self.bits - 2 * self.radius, -torch.inf)
            best.append(exclude(score, excluded, part).max(-1))
        return found_from(best, queries, metric)

    def _signs(self, x: Tensor, planes: Tensor) -> Tensor:
        """Sides of the hyperplanes as +-1: x [N, n, d] -> [N, tables, n, bits]."""
        side = torch.where(x @ planes > 0, 1.0, -1.0).to(x.dtype)
        return side.unflatten(-1, (self.tables, self.bits)).transpose(1, 2)


class LSHBucketizer(Bucketizer):
    """Bucket = sign pattern of `bits` random hyperplanes, shared by queries and keys.

    Args:
        bits: 1 to 16; 2^bits buckets.
        centre: take each side's own mean away first. Queries and keys of one head have means that point apart, and
            signs about the origin would then hardly ever agree.
        centre_queries: as `centre` for the queries alone; None: alike. False keeps what all queries ask for together:
            q.k ranks keys as q.(k - mean) does, not as (q - mean).(k - mean).
        seed: of the hyperplanes.
    """

    def __init__(
        self, *, bits: int = 4, centre: bool = True, centre_queries: bool | None = None, seed: int = 0
    ) -> None:
        check_bits(bits, 16)
        self.bits, self.centre, self.seed = bits, centre, seed
        self.centre_queries = centre if centre_queries is None else centre_queries

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        planes = seeded_planes(self.seed, keys.shape[2], self.bits, like=keys)
        centres = (
            queries.mean(1, keepdim=True) if self.centre_queries else None,
            mean_key(keys, valid) if self.centre else None,
        )
        return sign_codes(queries, planes, centres[0]), sign_codes(keys, planes, centres[1])


def check_bits(bits: int, most: int) -> None:
    """Raise a ValueError unless 1 <= bits <= most."""
    if not 1 <= bits <= most:
        raise ValueError(f"bits must be from 1 to {most}, got {bits}")


def check_lsh(bits: int, tables: int, radius: int) -> None:
    """Raise a ValueError unless these are settings of `LSHMatcher`."""
    check_bits(bits, 30)
    if tables < 1 or not 0 <= radius < bits:
        raise ValueError(f"LSH needs tables >= 1 and 0 <= radius < bits; got {tables}, {radius} and {bits}")


def mean_key(keys: Tensor, valid: Tensor | None) -> Tensor:
    """Mean [N, 1, d] of the keys [N, m, d] that are valid; None: of all."""
    if valid is None:
        return keys.mean(1, keepdim=True)
    weight = valid[..., None].to(keys.dtype)
    return (keys * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
