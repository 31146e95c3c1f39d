"""Sliding window, with or without an attention sink."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastar.cache.budget import BudgetOptions
from fastar.cache.eviction import EvictionPolicy
from fastar.cache.slots import Slots


class WindowCache(EvictionPolicy):
    """Keeps the newest tokens that fit. With `slot_bits` 4 it is the quantised window, over 3 times as long.

    Args:
        sink_frames: first frames of the rollout that stay for good (StreamingLLM, Xiao et al. 2023); 0 is the plain
            window.
        budget: see `BudgetedPolicy`.
    """

    def __init__(
        self,
        *,
        sink_frames: int = 0,
        **budget: Unpack[BudgetOptions],
    ) -> None:
        super().__init__(**budget)
        if sink_frames < 0:
            raise ValueError(f"sink_frames must not be negative, got {sink_frames}")
        self.sink_frames = sink_frames

    def score(self, layer: int, slots: Slots, arrived: int) -> Tensor:
        age = torch.arange(slots.size, dtype=torch.float32, device=self.spec.device)
        return age.masked_fill(age < self._sink_slots(), torch.inf)[None, None]

    def verbatim_slots(self) -> int:
        return self.capacity_slots() - self._sink_slots()

    def reserved_slots(self) -> int:
        chunk = self.spec.chunk_frames * self.spec.tokens_per_frame
        return self._sink_slots() + chunk

    def _sink_slots(self) -> int:
        return self.sink_frames * self.spec.tokens_per_frame
