"""The memory of a cache's slots, laid out so that attention can read them where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastar.cache.slots import Slots


class SlotBuffers:
    """A layer's slots by index, as `Slots` that share memory with what attention reads.

    Args:
        template: slots of the kind to hold, those of a layer; None: no layers yet.
        layers: how many.
        size: slots of each.
        key_width: last size of the keys in memory, of which the slots' own are the first; None for those alone.
        together: whether layers lie next to one another, so that work can be done for several at once (`part`). What
            grows should not be: it moves layer by layer.

    Attributes:
        generation: how often memory was exchanged.
    """

    def __init__(
        self,
        template: Slots | None = None,
        *,
        layers: int = 0,
        size: int = 0,
        key_width: int | None = None,
        together: bool = False,
    ) -> None:
        self._template, self._key_width, self._together = template, key_width, together
        self.generation = 0
        self._blocks = (
            [self._allocate(size, layers)] if together else []
        )  # slots, and keys as wide as they lie
        self._layers: list[tuple[Slots, Tensor]] = []
        if together:
            self._cut(layers)
        else:
            self._layers = [self._allocate(size, 1) for _ in range(layers)]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> Slots:
        return self._layers[layer][0]

    def __iter__(self) -> Iterator[Slots]:
        return (slots for slots, _ in self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, what keys have beyond their own width counted."""
        beyond = sum(_bytes(wide) - _bytes(slots["key"]) for slots, wide in self._layers)
        return beyond + sum(slots.nbytes for slots in self)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, size, key_width] and values [B, H, size, D] as they lie in memory."""
        slots, keys = self._layers[layer]
        return keys, slots["value"]

    def part(self, layers: range) -> Slots:
        """The slots of neighbouring layers as one, [layers * B, ...]; a single one, if they do not lie together."""
        if len(layers) == 1:
            return self[layers.start]
        (slots, _), total = self._blocks[0], len(self)
        return _cut_out(slots, layers, total)

    def reserve(self, size: int, keep: int, *, double: bool) -> None:
        """Have `size` slots in all layers; buffers that are too small are exchanged, with their first `keep` slots.

        Those that `double` grow to twice their size at least, so that growing costs a constant share of the writing.
        """
        if not self._layers or size <= self[len(self) - 1].size:
            return
        self.generation += 1
        size = max(size, 2 * self[len(self) - 1].size if double else 0)
        if self._together:
            old = list(self)
            self._blocks = [self._allocate(size, len(old))]
            self._cut(len(old))
            for new, before in zip(self, old, strict=True):
                new.write(0, before.narrow(0, keep))
            return
        for layer, before in enumerate(self):
            self._layers[layer] = self._allocate(size, 1)
            self[layer].write(0, before.narrow(0, keep))

    def move(self, fields: Mapping[str, Tensor]) -> None:
        """Have some fields of a single layer in other memory, tensors of the same shapes, which get their contents."""
        assert len(self) == 1 and self._together
        self.generation += 1
        slots = self[0]
        for name, place in fields.items():
            place.copy_(slots[name])
        moved = slots.replace(**fields)
        self._blocks = [(moved, moved["key"])]
        self._cut(1)

    def _cut(self, layers: int) -> None:
        """Layers, of the block that holds them together."""
        slots, keys = self._blocks[0]
        wide = keys.unflatten(0, (layers, -1))
        self._layers = [
            (_cut_out(slots, range(layer, layer + 1), layers), wide[layer]) for layer in range(layers)
        ]

    def _allocate(self, size: int, layers: int) -> tuple[Slots, Tensor]:
        """Zeroed slots of so many layers, and their keys as wide as they lie in memory."""
        assert self._template is not None
        narrow = self._template["key"].shape[-1]
        if self._key_width is None or self._key_width <= narrow:
            slots = self._template.empty(size, copies=layers)
            return slots, slots["key"]
        key = self._template["key"]
        wider = self._template.replace(key=key.new_zeros(*key.shape[:-1], self._key_width))
        slots = wider.empty(size, copies=layers)
        return slots.replace(key=slots["key"][..., :narrow]), slots["key"]


def _cut_out(slots: Slots, layers: range, total: int) -> Slots:
    """Slots [len(layers) * B, ...] of [total * B, ...], sharing memory."""
    parts = {name: tensor.unflatten(0, (total, -1)) for name, tensor in slots.fields.items()}
    return Slots({name: x[layers.start : layers.stop].flatten(0, 1) for name, x in parts.items()})


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
