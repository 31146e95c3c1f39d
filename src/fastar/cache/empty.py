"""No memory at all: the floor of every comparison."""

from __future__ import annotations

from torch import Tensor

from fastar.cache.base import Staged
from fastar.cache.change import Joined
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import Slots


class EmptyCache(SlotPolicy):
    """Keeps nothing: every chunk attends to itself alone."""

    def __init__(self) -> None:
        super().__init__()

    def capacity_slots(self) -> int:
        return 0

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Slots:
        return slots.narrow(0, 0)

    def drop_from(self, first_frame: int) -> None:
        self.next_frame = min(self.next_frame, first_frame)
        self._staged.clear()
