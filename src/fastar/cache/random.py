"""Random eviction: the control that any claim of clever selection must beat."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastar.cache.budget import BudgetOptions
from fastar.cache.eviction import RecentEvictionPolicy
from fastar.cache.slots import Slots


class RandomCache(RecentEvictionPolicy):
    """Evicts tokens drawn anew at every commit, so that old ones fade out; or keeps a uniform sample of all the past.

    The draw is a hash of seed, layer, batch element, head, token position and, if fading, the newest frame: there is no
    generator to save, and all devices draw alike.

    Args:
        fading: draw at every commit among what is left (each slot's chance to survive falls with its age). If False
            every token keeps the one number drawn for it, which makes the slots a uniform sample (reservoir).
        seed: of the draw.
        recent_frames: newest frames that always stay.
        budget: see `BudgetedPolicy`.
    """

    def __init__(
        self,
        *,
        fading: bool = True,
        seed: int = 0,
        recent_frames: int = 4,
        **budget: Unpack[BudgetOptions],
    ) -> None:
        super().__init__(recent_frames=recent_frames, **budget)
        self.fading, self.seed = fading, seed

    def worth(self, layer: int, slots: Slots) -> Tensor:
        position = slots["position"].long()
        batch, heads = position.shape[:2]
        stream = torch.arange(batch * heads, device=position.device).view(batch, heads, 1)
        salt = hash_integers(stream + layer * batch * heads + (self.seed << 32))
        if self.fading:
            salt = hash_integers(salt ^ position[..., -1:])
        return (hash_integers(position ^ salt) >> 40).float()  # 24 bits, exact in float32


def hash_integers(x: Tensor) -> Tensor:
    """Well-mixed non-negative int64 of an int64 tensor (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return (x ^ _shift(x, 31)) & (2**63 - 1)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
