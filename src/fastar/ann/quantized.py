"""Nearest neighbours in a space of few bits (paper section 1, "ANN matching", quantised search; 8 bits by default)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer, Excluded, Matcher, Metric, check_features, seeded_planes
from fastar.ann.exact import ExactMatcher, no_match
from fastar.ann.lsh import mean_key


class QuantizedMatcher(Matcher):
    """Exact search among symmetric codes of `bits` bits, one scale a problem, each side about the mean key.

    The codes are small integers held in float32, in which their products are exact: the result is that of an integer
    kernel on any device. It shows what a coarse code costs in recall; it is not faster than `ExactMatcher`.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, *, bits: int = 8) -> None:
        check_code_bits(bits)
        self.bits = bits
        self._search = ExactMatcher()

    def exact(self) -> Matcher:
        return self._search

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
        # q.k ranks keys as q.(k - c) does, so keys may be centred under either metric; queries only under distances
        centre = keys.mean(1, keepdim=True)
        keys = quantize(keys - centre, self.bits)
        queries = quantize(queries - centre if metric == "euclidean" else queries, self.bits)
        return self._search.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)


class QuantizedBucketizer(Bucketizer):
    """Bucket = code of a few random projections, each cut into 2^bits levels at the joint quantiles.

    Args:
        dims: random projections, shared by queries and keys.
        bits: of each projection's code; there are 2^(bits * dims) buckets, at most 2^16.
        centre: take each side's own mean away first; False leaves both about the origin.
        seed: of the projections.
    """

    def __init__(self, *, dims: int = 2, bits: int = 2, centre: bool = True, seed: int = 0) -> None:
        if dims < 1 or bits < 1 or dims * bits > 16:
            raise ValueError(f"dims and bits must be positive with dims * bits <= 16, got {dims} and {bits}")
        self.dims, self.bits, self.centre, self.seed = dims, bits, centre, seed

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        projection = seeded_planes(self.seed, keys.shape[2], self.dims, like=keys).float()
        if self.centre:
            queries, keys = queries - queries.mean(1, keepdim=True), keys - mean_key(keys, valid)
        sides = [(x.float() @ projection).mT.contiguous() for x in (queries, keys)]
        levels = 2**self.bits
        counted = sides if valid is None else [sides[0], sides[1].masked_fill(~valid[:, None], torch.inf)]
        joint = torch.cat(counted, -1).sort(dim=-1).values  # [N, dims, n + m], what is not valid last
        members = torch.full_like(joint[:, :1, :1], joint.shape[-1], dtype=torch.long)
        if valid is not None:
            members = members - (~valid).sum(1)[:, None, None]
        cuts = torch.arange(1, levels, device=joint.device) * members // levels  # [N, 1, levels - 1]
        edges = joint.gather(-1, cuts.expand(-1, self.dims, -1))
        radix = levels ** torch.arange(self.dims, device=joint.device)[:, None]
        query_ids, key_ids = ((torch.searchsorted(edges, side) * radix).sum(1) for side in sides)
        return query_ids, key_ids


def quantize(x: Tensor, bits: int) -> Tensor:
    """x [N, n, d] rounded to 2^bits - 1 symmetric levels of one scale for each of the N problems."""
    scale = code_scale(x, bits)
    return codes_at(x, scale, bits) * scale


def code_scale(x: Tensor, bits: int) -> Tensor:
    """Step [N, 1, 1] between the levels of x [N, n, d]."""
    return x.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)


def codes_at(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Levels of x [N, n, d] as whole numbers, in x's dtype."""
    top = 2 ** (bits - 1) - 1
    return (x / scale).round().clamp(-top, top)


def check_code_bits(bits: int) -> None:
    """Raise a ValueError unless 2 <= bits <= 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
