"""The container all policies keep their tokens in, and the number formats of keys and values.

A layer's slots are a few named tensors with the slots on axis 2: keys and values, packed as their format says, and
metadata such as position and count. Metadata that heads share has 1 on their axis and broadcasts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

ReadSlots = Literal["auto", "packed", "unpacked"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FRAME_BITS, _ROW_BITS, _COLUMN_BITS = 18, 7, 7
MAX_FRAME, MAX_SIDE = 2**_FRAME_BITS, 2**_ROW_BITS


class SlotOptions(TypedDict, total=False):
    """Keyword arguments of `fastar.cache.slot_cache.SlotCache`."""

    slot_bits: int
    storage: str
    quant_group: int | None
    read_slots: ReadSlots


@dataclass(frozen=True)
class SlotFormat:
    """How a key or value vector is held in memory.

    Attributes:
        bits: 16 keeps `dtype`. 8 and 4 hold unsigned codes (4 bits: two to a byte), one minimum and one step in float16
            for every `group` numbers of a token and head: x = minimum + step * code.
        dtype: storage dtype for bits = 16 (float32 is for tests of exactness).
        group: numbers that share a minimum and a step.
    """

    bits: int = 16
    dtype: torch.dtype = torch.bfloat16
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4):
            raise ValueError(f"slot_bits must be 16, 8 or 4, got {self.bits}")

    def check(self, head_dim: int) -> None:
        """Raise a ValueError if heads of `head_dim` numbers cannot be held in this format."""
        if self.bits < 16 and (head_dim % self.group or self.group % 2):
            raise ValueError(f"quant_group must be even and divide head_dim {head_dim}, got {self.group}")

    def pack(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """The tensors that hold x [..., D], named after it."""
        if self.bits == 16:
            return {name: x.to(self.dtype)}
        groups = x.float().unflatten(-1, (-1, self.group))
        low, high = groups.amin(-1), groups.amax(-1)
        top = 2**self.bits - 1
        low16 = low.half()
        # codes are formed with the rounded minimum and step, the numbers they will be read back with
        step16 = ((high - low16.float()) / top).clamp_min(torch.finfo(torch.float16).tiny).half()
        codes = ((groups - low16.float()[..., None]) / step16.float()[..., None]).round().clamp(0, top)
        flat = codes.to(torch.uint8).flatten(-2)
        if self.bits == 4:
            flat = flat[..., 0::2] | (flat[..., 1::2] << 4)
        return {name: flat, f"{name}_low": low16, f"{name}_step": step16}

    def unpack(self, name: str, fields: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The vectors [..., D] that `pack(name, ...)` put into `fields`."""
        codes = fields[name]
        if self.bits == 16:
            return codes.to(dtype)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        groups = codes.unflatten(-1, (-1, self.group)).float()
        return (
            (fields[f"{name}_low"].float()[..., None] + groups * fields[f"{name}_step"].float()[..., None])
            .flatten(-2)
            .to(dtype)
        )


class Slots:
    """Named tensors [B or 1, H or 1, S, ...] of one layer, handled as one sequence of S slots."""

    fields: Mapping[str, Tensor]

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        sizes = {name: tensor.shape[2] for name, tensor in fields.items()}
        assert len(set(sizes.values())) == 1, f"fields disagree in their number of slots: {sizes}"
        self.fields = fields

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    @property
    def size(self) -> int:
        """Number of slots S."""
        return next(iter(self.fields.values())).shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.fields.values())

    def narrow(self, start: int, stop: int) -> Slots:
        """Slots [start, stop), sharing memory."""
        return Slots({name: tensor[:, :, start:stop] for name, tensor in self.fields.items()})

    def gather(self, index: Tensor) -> Slots:
        """Slots at int64 `index` [B or 1, H or 1, S'], copied; an index of one head may serve all."""
        return Slots({name: take(tensor, index) for name, tensor in self.fields.items()})

    def replace(self, **fields: Tensor) -> Slots:
        """The same slots with some tensors exchanged."""
        return Slots({**self.fields, **fields})

    def empty(self, size: int, copies: int = 1) -> Slots:
        """Zeroed slots of the same kind, `size` of them, and that `copies` times along the first axis."""
        return Slots(
            {
                name: t.new_zeros(copies * t.shape[0], t.shape[1], size, *t.shape[3:])
                for name, t in self.fields.items()
            }
        )

    def write(self, start: int, other: Slots) -> None:
        """Copy `other` over the slots from `start` on, in place, unless it is what lies there."""
        for name, tensor in self.fields.items():
            target, source = tensor[:, :, start : start + other.size], other[name]
            if target.data_ptr() != source.data_ptr() or target.stride() != source.stride():
                target.copy_(source)

    @staticmethod
    def cat(*parts: Slots) -> Slots:
        """All slots of `parts`, in order, copied."""
        return Slots({name: torch.cat([p[name] for p in parts], 2) for name in parts[0].fields})


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor [B or 1, H or 1, S, ...] at index [B or 1, H or 1, S'] along axis 2, the two broadcast."""
    # torch.broadcast_shapes would import sympy for this: seconds, at the first eviction
    lead = [max(sizes) for sizes in zip(tensor.shape[:2], index.shape[:2], strict=True)]
    size, tail = tensor.shape[2], tensor.shape[3:]
    problems = torch.arange(lead[0] * lead[1], device=index.device).view(*lead, 1)
    rows = (
        index + problems * size
    ).flatten()  # whole rows move, which `gather` with an expanded index does not
    return tensor.expand(*lead, size, *tail).flatten(0, 2).index_select(0, rows).view(*lead, -1, *tail)


def pack_positions(positions: Tensor) -> Tensor:
    """(frame, row, column) [..., 3] as one int32 [...] that sorts the same way: 18 + 7 + 7 bits."""
    frame, row, column = positions.unbind(-1)
    code = (frame << (_ROW_BITS + _COLUMN_BITS)) | (row << _COLUMN_BITS) | column
    return (code - 2**31).to(torch.int32)


def unpack_positions(packed: Tensor) -> Tensor:
    """Inverse of `pack_positions`: int64 [..., 3]."""
    code = packed.long() + 2**31
    side = 2**_COLUMN_BITS
    return torch.stack(
        [code >> (_ROW_BITS + _COLUMN_BITS), (code >> _COLUMN_BITS) % MAX_SIDE, code % side], -1
    )


def saved_tensor(saved: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """saved[name] on the device of `like`, whose dtype and shape it must have, except for the number of slots."""
    tensor = saved.get(name)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"the saved cache has no {name}: it was saved by another policy or with other settings"
        )
    if tensor.dtype != like.dtype or tensor.shape[:2] != like.shape[:2] or tensor.shape[3:] != like.shape[3:]:
        raise ValueError(
            f"saved {name} is {tensor.dtype} {tuple(tensor.shape)}, but this cache holds {like.dtype} "
            f"{tuple(like.shape)} (third size free): it was saved with other settings"
        )
    return tensor.to(like.device)
