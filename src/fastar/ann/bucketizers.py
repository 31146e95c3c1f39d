"""Data-dependent buckets (k-means) and the control that ignores the data (random)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer, check_features, seeded_normal
from fastar.ann.lsh import mean_key
from fastar.ann.similarity import squared_distance


class KMeansBucketizer(Bucketizer):
    """Bucket = nearest of `clusters` centroids, fitted to the keys; queries are assigned to the keys' centroids.

    Lloyd's iterations start from evenly spaced keys, so nothing is random. Both sides are taken about their own mean,
    as queries and keys of one head are offset from one another. A centroid that loses all its keys stays where it was.

    Args:
        clusters: number of buckets; fewer keys than that give fewer buckets.
        iterations: Lloyd's iterations.
    """

    def __init__(self, *, clusters: int = 16, iterations: int = 4) -> None:
        if clusters < 1 or iterations < 0:
            raise ValueError(
                f"k-means needs clusters >= 1 and iterations >= 0, got {clusters} and {iterations}"
            )
        self.clusters, self.iterations = clusters, iterations

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        queries = (queries - queries.mean(1, keepdim=True)).float()
        keys = (keys - mean_key(keys, valid)).float()
        valid = torch.ones_like(keys[..., 0], dtype=torch.bool) if valid is None else valid
        count = min(self.clusters, keys.shape[1])
        spread = torch.arange(count, device=keys.device) * valid.sum(1, keepdim=True) // count
        first = (~valid).to(torch.int8).argsort(dim=1, stable=True).gather(1, spread)
        centroids = keys.gather(1, first[..., None].expand(-1, -1, keys.shape[2]))
        for _ in range(self.iterations):
            member = torch.nn.functional.one_hot(squared_distance(keys, centroids).argmin(-1), count).to(keys)
            member = member * valid[..., None]
            size = member.sum(1)[..., None]
            centroids = torch.where(size > 0, member.mT @ keys / size.clamp_min(1), centroids)
        return squared_distance(queries, centroids).argmin(-1), squared_distance(keys, centroids).argmin(-1)


class RandomBucketizer(Bucketizer):
    """Control: evenly filled buckets drawn without looking at the data.

    Args:
        count: number of buckets.
        seed: of the draw.
    """

    def __init__(self, *, count: int = 16, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.seed = count, seed

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        return self._draw(queries, self.seed), self._draw(keys, self.seed + 1)

    def _draw(self, x: Tensor, seed: int) -> Tensor:
        return seeded_normal(seed, *x.shape[:2], like=x.float()).argsort(dim=-1) % self.count
