"""The unbounded cache: every token is kept."""

from __future__ import annotations

from torch import Tensor

from fastar.cache.base import Staged
from fastar.cache.change import Change, Edit, Joined, Prepared, Scratch
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import Slots


class DenseCache(SlotPolicy):
    """Keeps everything; memory and work per pass grow with the rollout. The reference of every comparison.

    Args:
        slot_bits, storage, quant_group, read_slots: see `SlotCache`.
    """

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Change:
        return Change(slots)

    def _commit_layer(self, layer: int, scratch: Scratch) -> tuple[Slots | Edit, dict[str, Tensor]]:
        return self.encode(self._staged[layer]), {}  # what arrives, without a copy of the history

    def _take_in(self, prepared: Prepared) -> int:
        # What lies beyond `filled` is invisible until the commit ends.
        total = self.filled + prepared[0][0].size
        self._reserve(total, keep=self.filled)
        for buffer, (slots, _) in zip(self._buffers, prepared, strict=True):
            assert isinstance(slots, Slots)
            buffer.write(self.filled, slots)
        return total
