"""The memory of a cache's slots, one buffer a layer, laid out so that attention can read them where they lie."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastar.cache.slots import Slots


class SlotBuffers:
    """A layer's slots by index, as `Slots` that share memory with what attention reads.

    Args:
        template: slots of the kind to hold; None: no layers yet.
        layers: how many buffers.
        size: slots of each.
        key_width: last size of the keys in memory, of which the slots' own are the first; None for those alone.
    """

    def __init__(
        self,
        template: Slots | None = None,
        *,
        layers: int = 0,
        size: int = 0,
        key_width: int | None = None,
    ) -> None:
        self._template, self._key_width = template, key_width
        self.generation = 0  # how often buffers were exchanged
        allocated = [self._allocate(size) for _ in range(layers)]
        self._layers = [slots for slots, _ in allocated]
        self._keys = [keys for _, keys in allocated]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> Slots:
        return self._layers[layer]

    def __iter__(self) -> Iterator[Slots]:
        return iter(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, what keys have beyond their own width counted."""
        beyond = sum(
            wide.numel() * wide.element_size() - own["key"].numel() * own["key"].element_size()
            for wide, own in zip(self._keys, self._layers, strict=True)
        )
        return beyond + sum(buffer.nbytes for buffer in self._layers)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, size, key_width] and values [B, H, size, D] as they lie in memory."""
        return self._keys[layer], self._layers[layer]["value"]

    def reserve(self, size: int, keep: int, *, double: bool) -> None:
        """Have `size` slots in all layers; buffers that are too small are exchanged, with their first `keep` slots.

        Those that `double` grow to twice their size at least, so that growing costs a constant share of the writing.
        """
        for layer, buffer in enumerate(self._layers):
            if size > buffer.size:
                grown, keys = self._allocate(max(size, 2 * buffer.size if double else 0))
                grown.write(0, buffer.narrow(0, keep))
                self._layers[layer], self._keys[layer] = grown, keys
                self.generation += 1

    def _allocate(self, size: int) -> tuple[Slots, Tensor]:
        """Zeroed slots, and their keys as wide as they lie in memory."""
        assert self._template is not None
        slots = self._template.empty(size)
        keys = slots["key"]
        own_width = keys.shape[-1]
        if self._key_width is None or self._key_width <= own_width:
            return slots, keys
        keys = keys.new_zeros(*keys.shape[:-1], self._key_width)
        return slots.replace(key=keys[..., :own_width]), keys
