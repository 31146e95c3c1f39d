"""Policies that drop tokens: a leaf says what each one is worth."""

from __future__ import annotations

from abc import abstractmethod
from typing import Unpack

import torch
from torch import Tensor

from fastar.cache.base import Staged
from fastar.cache.budget import BudgetedPolicy, BudgetOptions
from fastar.cache.change import Change, Joined
from fastar.cache.slots import Slots


class EvictionPolicy(BudgetedPolicy):
    """Keeps the slots of highest score; of equal scores the newer stays. See `BudgetedPolicy` for the arguments."""

    @abstractmethod
    def score(self, layer: int, slots: Slots, arrived: int) -> Tensor:
        """What each slot is worth: float [*metadata_shape, slots], inf for those that must stay."""

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Change:
        capacity = self.capacity_slots()
        if slots.size <= capacity:
            return Change(slots)
        ranked = self.score(layer, slots, arrived).argsort(dim=-1, stable=True)  # oldest first among equals
        keep = ranked[..., -capacity:].sort(dim=-1).values
        return Change(slots, keep, arrivals_stay=arrived <= self.verbatim_slots())


class RecentEvictionPolicy(EvictionPolicy):
    """Evicts per head by `worth`, but never the newest `recent_frames` frames.

    Args:
        recent_frames: newest frames that always stay.
        budget: see `BudgetedPolicy`.
    """

    def __init__(
        self,
        *,
        recent_frames: int = 4,
        **budget: Unpack[BudgetOptions],
    ) -> None:
        super().__init__(**budget)
        if recent_frames < 0:
            raise ValueError(f"recent_frames must not be negative, got {recent_frames}")
        self.recent_frames = recent_frames

    @abstractmethod
    def worth(self, layer: int, slots: Slots) -> Tensor:
        """What each slot is worth: float [B, H, slots], finite."""

    def score(self, layer: int, slots: Slots, arrived: int) -> Tensor:
        newest = torch.arange(slots.size, device=self.spec.device) >= slots.size - self.verbatim_slots()
        return self.worth(layer, slots).masked_fill(newest, torch.inf)

    def verbatim_slots(self) -> int:
        return self.recent_frames * self.spec.tokens_per_frame

    def reserved_slots(self) -> int:
        return self.verbatim_slots()

    def metadata_shape(self) -> tuple[int, int]:
        return (self.spec.batch, self.spec.num_heads)
