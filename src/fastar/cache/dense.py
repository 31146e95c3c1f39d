"""The unbounded cache: every token is kept."""

from __future__ import annotations

from torch import Tensor

from fastar.cache.base import Staged
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import Slots


class DenseCache(SlotPolicy):
    """Keeps everything; memory and work per pass grow with the rollout. The reference of every comparison.

    Args:
        slot_bits, storage, quant_group: see `SlotPolicy`.
    """

    def absorb(
        self, layer: int, slots: Slots, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Slots:
        return slots

    def _take_in(self) -> int:
        # Appending in place copies no history. What lies beyond `filled` is invisible until the commit ends.
        arrivals = [self._encode(self._staged[layer]) for layer in range(self.spec.num_layers)]
        total = self.filled + arrivals[0].size
        self._reserve(total, keep=self.filled)
        for buffer, slots in zip(self._buffers, arrivals, strict=True):
            buffer.write(self.filled, slots)
        return total
