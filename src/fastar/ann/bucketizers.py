"""Data-dependent buckets (k-means) and the control that ignores the data (random)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer, check_features, seeded_normal
from fastar.ann.codes import nearest_codes, nearest_of
from fastar.ann.lsh import mean_key


class KMeansBucketizer(Bucketizer):
    """Bucket = nearest of `clusters` centroids, fitted to the keys; queries are assigned to the keys' centroids.

    Lloyd's iterations start from evenly spaced keys, so nothing is random. Both sides are taken about their own mean,
    as queries and keys of one head are offset from one another. A centroid that loses all its keys stays where it was.

    Args:
        clusters: number of buckets, at most 2^16; fewer keys than that give fewer buckets.
        iterations: Lloyd's iterations.
        samples: at most so many evenly spaced keys are what centroids and the keys' mean are fitted to, so that fitting
            does not grow with the cache; None: all.
    """

    def __init__(self, *, clusters: int = 16, iterations: int = 4, samples: int | None = None) -> None:
        if not 1 <= clusters <= 2**16 or iterations < 0:
            raise ValueError(
                f"k-means needs clusters from 1 to 65536 and iterations >= 0, got {clusters} and {iterations}"
            )
        if samples is not None and samples < clusters:
            raise ValueError(
                f"k-means needs at least as many samples as clusters, got {samples} for {clusters}"
            )
        self.clusters, self.iterations, self.samples = clusters, iterations, samples

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        fitted, known = keys, valid
        if self.samples is not None and keys.shape[1] > self.samples:
            spread = torch.arange(self.samples, device=keys.device) * keys.shape[1] // self.samples
            fitted, known = keys[:, spread], None if valid is None else valid[:, spread]
        centre = mean_key(fitted, known)
        centroids = self._fit((fitted - centre).float(), known)
        return (
            nearest_codes(queries, centroids, queries.mean(1, keepdim=True)),
            nearest_codes(keys, centroids, centre),
        )

    def _fit(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Centroids [N, clusters, d] of keys [N, m, d]."""
        valid = torch.ones_like(keys[..., 0], dtype=torch.bool) if valid is None else valid
        count = min(self.clusters, keys.shape[1])
        numbers = torch.arange(count, device=keys.device)
        spread = numbers * valid.sum(1, keepdim=True) // count
        first = (~valid).to(torch.int8).argsort(dim=1, stable=True).gather(1, spread)
        centroids = keys.gather(1, first[..., None].expand(-1, -1, keys.shape[2]))
        for _ in range(self.iterations):
            member = nearest_of(keys, centroids)[..., None] == numbers
            member = (member & valid[..., None]).to(keys)
            size = member.sum(1)[..., None]
            centroids = torch.where(size > 0, member.mT @ keys / size.clamp_min(1), centroids)
        return centroids


class RandomBucketizer(Bucketizer):
    """Control: evenly filled buckets drawn without looking at the data.

    Args:
        count: number of buckets, at most 2^16.
        seed: of the draw.
    """

    def __init__(self, *, count: int = 16, seed: int = 0) -> None:
        if not 1 <= count <= 2**16:
            raise ValueError(f"count must be from 1 to 65536, got {count}")
        self.count, self.seed = count, seed

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        return self._draw(queries, self.seed), self._draw(keys, self.seed + 1)

    def _draw(self, x: Tensor, seed: int) -> Tensor:
        return seeded_normal(seed, *x.shape[:2], like=x.float()).argsort(dim=-1) % self.count
