"""Sliding window, with or without an attention sink."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fastar.cache.base import Staged
from fastar.cache.budget import BudgetedPolicy, BudgetOptions
from fastar.cache.change import Change, Joined, drop_oldest


class WindowCache(BudgetedPolicy):
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

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Change:
        return drop_oldest(slots, self._sink_slots(), self.capacity_slots(), arrived)

    def verbatim_slots(self) -> int:
        return self.capacity_slots() - self._sink_slots()

    def reserved_slots(self) -> int:
        chunk = self.spec.chunk_frames * self.spec.tokens_per_frame
        return self._sink_slots() + chunk

    def _sink_slots(self) -> int:
        return self.sink_frames * self.spec.tokens_per_frame
