"""Eviction by key norm (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy", for language models)."""

from __future__ import annotations

from torch import Tensor

from fastar.cache.eviction import RecentEvictionPolicy
from fastar.cache.slots import Slots


class KeyNormCache(RecentEvictionPolicy):
    """Keeps the keys of smallest norm, which in language models draw the most attention. RoPE leaves norms alone.

    Args: see `RecentEvictionPolicy`.
    """

    def worth(self, layer: int, slots: Slots) -> Tensor:
        keys = self._format.unpack("key", slots.fields, self.spec.compute_dtype)
        return -keys.float().norm(dim=-1)
