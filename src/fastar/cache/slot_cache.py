"""Tokens that are kept in slots: where these lie, how attention reads them, what they take and how they are saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastar.cache.base import (
    CachePolicy,
    CacheSpec,
    CacheView,
    Packing,
    Room,
    Staged,
    StoredView,
    check_choice,
)
from fastar.cache.buffers import SlotBuffers
from fastar.cache.change import Edit, Prepared
from fastar.cache.slots import (
    DTYPES,
    ReadSlots,
    SlotFormat,
    Slots,
    pack_positions,
    saved_tensor,
    unpack_positions,
)


class SlotCache(CachePolicy):
    """What is kept from one commit to the next; what a commit does is the other half, `SlotPolicy`.

    A layer's slots live in one buffer, at one address, next to those of the other layers. Where they are as attention
    wants them, it reads them there, with the current chunk behind them (`room`). Keys are stored roped, at the storage
    precision; so are quantised ones.

    Args:
        slot_bits: 16, or 8 and 4 for codes that are really packed in memory (see `SlotFormat`).
        storage: dtype of 16-bit slots: bfloat16, float16, or float32 where exactness is to be tested.
        quant_group: numbers that share a scale in 8- and 4-bit slots; None means a whole head.
        read_slots: how attention reads 8- and 4-bit slots: `packed`, as they are, where it can, which needs a GPU, or
            `unpacked`, from a copy in the compute dtype, which is faster; `auto` decides once a rollout and says so
            (`fastar.attention.reading`).
    """

    def __init__(
        self,
        *,
        slot_bits: int = 16,
        storage: str = "bfloat16",
        quant_group: int | None = None,
        read_slots: ReadSlots = "auto",
    ) -> None:
        super().__init__()
        check_choice("read_slots", read_slots, ("auto", "packed", "unpacked"))
        if storage not in DTYPES:
            raise ValueError(f"unknown storage {storage!r}: choose one of {', '.join(DTYPES)}")
        self._format = SlotFormat(slot_bits, DTYPES[storage], quant_group or 64)
        self._quant_group = quant_group
        if read_slots == "packed" and slot_bits == 16:
            raise ValueError(
                "read_slots=packed needs slots of 8 or 4 bits: set slot_bits, or read_slots=auto"
            )
        self.read_slots = read_slots
        self._buffers = SlotBuffers()
        self._extras: list[dict[str, Tensor]] = []
        self.filled = 0  # slots in use, the same in all layers and heads

    # -- what a slot is, and how many there are ------------------------------------------------------------------

    @property
    def counts_tokens(self) -> bool:
        return type(self)._log_count is not SlotCache._log_count

    def capacity_slots(self) -> int | None:
        """Slots a layer and head may hold; None if unbounded."""
        return None

    def spare_slots(self) -> int:
        """Room behind a layer's slots, for arrivals that pass through it in a commit."""
        return 0

    def metadata_shape(self) -> tuple[int, int]:
        """Leading sizes (batch, heads) of metadata; 1 where it is shared."""
        return (1, 1)

    def metadata(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        """Further tensors of newly arrived slots, each `shape` = (*metadata_shape, slots)."""
        return {}

    def new_extras(self) -> dict[str, Tensor]:
        """Tensors of fixed size that a layer keeps besides its slots."""
        return {}

    # -- memory, and what attention reads of it ------------------------------------------------------------------

    def bind(self, spec: CacheSpec) -> None:
        if self._quant_group is None:
            self._format = SlotFormat(self._format.bits, self._format.dtype, spec.head_dim)
        self._format.check(spec.head_dim)
        super().bind(spec)
        try:
            capacity = self.capacity_slots()
        except ValueError:
            self._spec = None
            raise
        self._buffers = SlotBuffers(
            self._encode_empty(),
            layers=spec.num_layers,
            size=(capacity or 0) + self.spare_slots(),
            key_width=spec.key_width if self._read_in_place else None,
            together=capacity is not None,
        )
        self._extras = [self.new_extras() for _ in range(spec.num_layers)]

    def layout(self) -> tuple[int, ...] | None:
        return (self.filled, self._buffers.generation)

    def view(self, layer: int) -> CacheView:
        spec, stored = self.spec, self.stored(layer)
        k, v = stored.unpacked(spec.compute_dtype)
        if not self.filled:
            return CacheView(k, v, None, None)
        positions = unpack_positions(stored.slots["position"]).expand(spec.batch, spec.num_heads, -1, -1)
        return CacheView(k, v, stored.log_count, positions)

    def stored(self, layer: int) -> StoredView:
        slots = self._buffers[layer].narrow(0, self.filled)
        return StoredView(slots, self._format, self._log_count(slots) if self.filled else None)

    @property
    def buffers(self) -> SlotBuffers:
        """Where slots lie."""
        return self._buffers

    @property
    def packing(self) -> Packing | None:
        if self._format.bits == 16:
            return None
        spec, capacity = self.spec, self.capacity_slots()
        copies = None if capacity is None else spec.num_layers * capacity * spec.slot_copy_bytes
        return Packing(self._format, self.read_slots, copies)

    def room(self, layer: int, tokens: int) -> Room | None:
        if not self._read_in_place:
            return None
        # a cache that is to be full some day has its memory, and keeps its address, from the first pass on
        self._reserve(max(self.filled, self.capacity_slots() or 0) + tokens, keep=self.filled)
        return Room(*(x[:, :, : self.filled + tokens] for x in self._buffers.keys_values(layer)))

    @property
    def _read_in_place(self) -> bool:
        """Whether slots are in memory as attention wants them."""
        return self._format.bits == 16 and self._format.dtype == self.spec.compute_dtype

    # -- accounting and saved state ------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        slots = sum(buffer.narrow(0, self.filled).nbytes for buffer in self._buffers)
        return slots + len(self._buffers) * self.extras_bytes()

    def slots_used(self) -> int:
        return self.filled

    def capacity_bytes(self) -> int | None:
        capacity = self.capacity_slots()
        if capacity is None:
            return None
        return self.spec.num_layers * (capacity * self.slot_bytes() + self.extras_bytes())

    def working_bytes(self) -> int:
        """Bytes beyond `bytes_used`: of slots not filled, the current chunk's among them, and an engine's own."""
        return self._buffers.nbytes - sum(buffer.narrow(0, self.filled).nbytes for buffer in self._buffers)

    def slot_bytes(self) -> int:
        """Bytes of one slot of one layer in all batch elements and heads, metadata included."""
        return self._encode_empty().nbytes

    def extras_bytes(self) -> int:
        """Bytes of a layer's `extras`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.new_extras().values())

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {name: getattr(self, name) for name in self._counters()}
        for layer, (buffer, extras) in enumerate(zip(self._buffers, self._extras, strict=True)):
            for name, tensor in buffer.narrow(0, self.filled).fields.items():
                saved[f"layers.{layer}.slots.{name}"] = tensor.clone()
            for name, tensor in extras.items():
                saved[f"layers.{layer}.extras.{name}"] = tensor.clone()
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        slot_fields, extra_fields = self._encode_empty().fields, self.new_extras()
        slots, extras = [], []
        for layer in range(self.spec.num_layers):
            at = f"layers.{layer}."
            slots.append(Slots({n: saved_tensor(saved, f"{at}slots.{n}", t) for n, t in slot_fields.items()}))
            read = {n: saved_tensor(saved, f"{at}extras.{n}", t) for n, t in extra_fields.items()}
            extras.append({name: tensor.clone() for name, tensor in read.items()})
        capacity = self.capacity_slots()
        if capacity is not None and slots[0].size > capacity:
            raise ValueError(
                f"the saved cache has {slots[0].size} slots, but this one's budget holds {capacity}"
            )
        counters = {name: saved[name] for name in self._counters()}
        self._store(list(zip(slots, extras, strict=True)))
        for name, value in counters.items():
            setattr(self, name, value)

    def _counters(self) -> tuple[str, ...]:
        """Plain numbers that belong to the saved state."""
        return ("filled",)

    # -- internals -----------------------------------------------------------------------------------------------

    def encode(self, staged: Staged) -> Slots:
        """Newly arrived tokens as slots."""
        shape = (*self.metadata_shape(), staged.k.shape[2])
        position = pack_positions(staged.positions).expand(shape)
        packed = {**self._format.pack("key", staged.k), **self._format.pack("value", staged.v)}
        return Slots({**packed, "position": position, **self.metadata(shape, staged.k.device)})

    def _encode_empty(self) -> Slots:
        """One slot of this policy's kind, holding zeros: a template for sizes."""
        spec = self.spec
        zero = torch.zeros(spec.batch, spec.num_heads, 1, spec.head_dim, device=spec.device)
        positions = torch.zeros(1, 3, dtype=torch.long, device=spec.device)
        return self.encode(Staged(zero, zero, zero, zero, positions))

    def _store(self, layers: Prepared) -> None:
        """Put slots and extras in place of the current ones. Buffers that suffice are kept, at their address."""
        self._reserve(layers[0][0].size, keep=0)
        together = self.spec.num_layers // len(layers)
        for number, (result, extras) in enumerate(layers):
            of_these = range(number * together, (number + 1) * together)
            buffer = self._buffers.part(of_these)
            if isinstance(result, Edit):
                result.apply(buffer)
            else:
                buffer.write(0, result)
            for name, tensor in extras.items():  # at their addresses, where a captured commit reads them
                for layer, new in zip(of_these, tensor.chunk(together), strict=True):
                    self._extras[layer][name].copy_(new)

    def _reserve(self, size: int, keep: int) -> None:
        """Have room for `size` slots in all layers; a growing buffer takes its first `keep` slots along."""
        self._buffers.reserve(size, keep, double=self.capacity_slots() is None)

    def _log_count(self, slots: Slots) -> Tensor | None:
        return None
