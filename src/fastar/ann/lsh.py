"""Locality-sensitive hashing with random hyperplanes (paper section 1, "ANN matching", LSH)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer, Matcher, Metric, check_features, seeded_normal
from fastar.ann.exact import no_match


class LSHMatcher(Matcher):
    """Top-1 among the keys whose sign pattern under random hyperplanes equals the query's, in any table.

    Keys are sorted by code, so the work is n x tables x (1 + probes) x bucket_cap scores instead of n x m. Keys
    are hashed after their mean is taken away: signs about the origin would put keys that share a mean into one bucket.

    Args:
        bits: hyperplanes a table, 1 to 30; a table has 2^bits buckets.
        tables: independent tables; a key is a candidate if any table agrees.
        probes: further buckets looked up in each table, those across the hyperplanes nearest to the query.
        bucket_cap: at most this many keys of a bucket are scored, the last (newest) ones.
        seed: of the hyperplanes.
    """

    def __init__(
        self, *, bits: int = 6, tables: int = 6, probes: int = 2, bucket_cap: int = 16, seed: int = 0
    ) -> None:
        check_bits(bits, 30)
        if tables < 1 or not 0 <= probes <= bits or bucket_cap < 1:
            raise ValueError(
                "LSH needs tables >= 1, 0 <= probes <= bits and bucket_cap >= 1; "
                f"got tables={tables}, probes={probes}, bits={bits}, bucket_cap={bucket_cap}"
            )
        self.bits, self.tables, self.probes, self.bucket_cap, self.seed = (
            bits,
            tables,
            probes,
            bucket_cap,
            seed,
        )

    def nearest(
        self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None, metric: Metric = "dot"
    ) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        if keys.shape[1] == 0 or queries.shape[1] == 0:
            return no_match(queries)
        candidates, found = self._candidates(queries, keys, valid, metric)
        score = _scores(queries, keys, candidates, metric).masked_fill(~found, -torch.inf)
        best = score.max(-1, keepdim=True)
        # of equal scores the first key wins, whichever table it came from
        tied = torch.where(score == best.values, candidates, keys.shape[1])
        index = torch.where(best.values[..., 0] == -torch.inf, -1, tied.amin(-1))
        return index, best.values[..., 0]

    def _candidates(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        """Key indices [N, n, tables * (1 + probes) * cap] and whether each is a real candidate."""
        problems, count = queries.shape[:2]
        planes = seeded_normal(self.seed, keys.shape[2], self.tables * self.bits, like=keys)
        centre = _mean(keys, valid)
        key_side = ((keys - centre) @ planes).unflatten(-1, (self.tables, self.bits))
        # q.k ranks keys as q.(k - centre) does: only a distance moves the queries too
        query_side = ((queries - centre if metric == "euclidean" else queries) @ planes).unflatten(
            -1, (self.tables, self.bits)
        )
        key_code = _code(key_side)
        if valid is not None:
            key_code = key_code.masked_fill(
                ~valid[..., None], 2**self.bits
            )  # a bucket that no query looks up
        # newest first within a bucket: sort the reversed keys, stably
        sorted_code, order = key_code.flip(1).transpose(1, 2).contiguous().sort(dim=-1, stable=True)
        order = keys.shape[1] - 1 - order

        looked_up = _code(query_side)[..., None]
        if self.probes:
            flipped = query_side.abs().topk(self.probes, dim=-1, largest=False).indices
            looked_up = torch.cat([looked_up, looked_up ^ (1 << flipped)], -1)
        looked_up = looked_up.permute(0, 2, 1, 3).reshape(
            problems, self.tables, -1
        )  # [N, tables, n * (1 + probes)]
        start = torch.searchsorted(sorted_code, looked_up)
        place = start[..., None] + torch.arange(self.bucket_cap, device=keys.device)
        inside = place < keys.shape[1]
        place = place.clamp_max(keys.shape[1] - 1).flatten(2)
        found = inside & (sorted_code.gather(2, place).view_as(inside) == looked_up[..., None])
        shape = (problems, self.tables, count, -1)
        candidates = order.gather(2, place).view(shape).transpose(1, 2).flatten(2)
        return candidates, found.view(shape).transpose(1, 2).flatten(2)


class LSHBucketizer(Bucketizer):
    """Bucket = sign pattern of `bits` random hyperplanes, shared by queries and keys.

    Args:
        bits: 1 to 16; 2^bits buckets.
        centre: take each side's own mean away first. Queries and keys of one head have means that point apart, and
            signs about the origin would then hardly ever agree.
        seed: of the hyperplanes.
    """

    def __init__(self, *, bits: int = 4, centre: bool = True, seed: int = 0) -> None:
        check_bits(bits, 16)
        self.bits, self.centre, self.seed = bits, centre, seed

    def buckets(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        check_features(queries, keys)
        planes = seeded_normal(self.seed, keys.shape[2], self.bits, like=keys)
        sides = [x - x.mean(1, keepdim=True) if self.centre else x for x in (queries, keys)]
        return _code(sides[0] @ planes), _code(sides[1] @ planes)


def check_bits(bits: int, most: int) -> None:
    """Raise a ValueError unless 1 <= bits <= most."""
    if not 1 <= bits <= most:
        raise ValueError(f"bits must be from 1 to {most}, got {bits}")


def _code(side: Tensor) -> Tensor:
    """Signs [..., bits] as one integer [...]."""
    return ((side > 0).long() << torch.arange(side.shape[-1], device=side.device)).sum(-1)


def _mean(keys: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return keys.mean(1, keepdim=True)
    weight = valid[..., None].to(keys.dtype)
    return (keys * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)


def _scores(queries: Tensor, keys: Tensor, candidates: Tensor, metric: Metric) -> Tensor:
    """Score of every candidate: [N, n, c] from candidates int64 [N, n, c]."""
    width = keys.shape[-1]
    chosen = keys.gather(1, candidates.flatten(1)[..., None].expand(-1, -1, width)).view(
        *candidates.shape, width
    )
    if metric == "euclidean":
        return -(chosen - queries[:, :, None]).square().sum(-1)
    return (chosen @ queries[..., None]).squeeze(-1)
