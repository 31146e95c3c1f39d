"""Attention that reads int8 or int4 slots as they are stored, without a copy of the cache in the compute dtype.

`fastar.cache.slots.SlotFormat` says how slots are packed. Vectors are made of the codes tile by tile, rounded to the
queries' dtype as `SlotFormat.unpack` rounds them; the current chunk's keys and values follow as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from fastar.ann.launch import interpreted


@dataclass(frozen=True)
class Tile:
    """Queries and slots that a program handles at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


# Compiles for sm_90 without spilled registers (tests/engines/compile_kernels.py), not tuned on a GPU.
TILES = {8: Tile(queries=128, keys=64, warps=8, stages=3), 4: Tile(queries=128, keys=64, warps=8, stages=2)}
_SMALLEST, _WIDEST = 16, 128


@dataclass(frozen=True)
class Packed:
    """Vectors [B, H, S, D] as codes.

    Attributes:
        codes: uint8 [B, H, S, D], or [B, H, S, D / 2] with two codes of 4 bits each, the earlier one in the low bits.
        low, step: float16 [B, H, S, groups]: a number is low + step * code; D / groups numbers in a row share both.
    """

    codes: Tensor
    low: Tensor
    step: Tensor

    def bits(self, head_dim: int) -> int:
        """8 or 4, for vectors of `head_dim` numbers."""
        return 8 * self.codes.shape[3] // head_dim

    def group(self, head_dim: int) -> int:
        """Numbers that share a minimum and a step."""
        return head_dim // self.low.shape[3]


@dataclass(frozen=True)
class HeadRows:
    """Where each head's slots lie, one after the other, if heads have unequally many: int64 and int32 [B, H].

    Attributes:
        first: the row of a head's first slot, of the rows that all heads share.
        lengths: how many it has.
    """

    first: Tensor
    lengths: Tensor

    def check(self, lead: tuple[int, ...]) -> None:
        """Raise a ValueError unless they are of `lead` = (batch, heads) and of their dtypes."""
        found = [(tuple(x.shape), x.dtype) for x in (self.first, self.lengths)]
        if found != [(lead, torch.int64), (lead, torch.int32)]:
            raise ValueError(
                f"first rows must be int64 and lengths int32, both [batch, heads] = {lead}, got {found}"
            )


def unfit(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> str | None:
    """Why `attend_packed` cannot take the calls of a rollout, or None.

    Args:
        device, dtype: that attention is computed on and in. In float32 a GPU would multiply in tf32, which is refused:
            who computes in float32 wants its digits.
        head_dim: numbers of a head.
        group: numbers that share a minimum and a step.
    """
    reason = _missing(device)
    if reason is not None:
        return reason
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not in {dtype}"
    if head_dim & (head_dim - 1) or not _SMALLEST <= head_dim <= _WIDEST:
        return f"it takes heads of 16, 32, 64 or 128 numbers, not {head_dim}"
    if group & (group - 1):
        return f"it takes a power of two of numbers to a quant_group, not {group}"
    return None


def attend_packed(
    q: Tensor,
    keys: Packed,
    values: Packed,
    k: Tensor,
    v: Tensor,
    *,
    log_count: Tensor | None = None,
    rows: HeadRows | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over packed slots and the current chunk, softmax scale 1/sqrt(D).

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, C, D] of the current chunk, in q's dtype; D a power of two from 16 to 128.
        keys, values: S packed slots, or slices of S slots of larger buffers, all of which have the same capacity.
        log_count: [B, H, S] float32, or broadcastable to it: added to the logits of a slot, -inf for an empty one. Read
            in place if it lies as `beside_slots` puts it.
        rows: of the heads. Packed slots are then rows of all of them, [1, 1, S, ...], as are log-counts.
        tile: None for the one of `TILES` that suits the fewest bits.

    Returns:
        out [B, H, Lq, D] in q's dtype, and natural log-sum-exp [B, H, Lq] float32. A query without any key to attend
        to gets zeros and -inf.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take; neither a GPU nor Triton's interpreter.
    """
    reason = _missing(q.device)
    if reason is not None:
        raise ValueError(f"attention over packed slots cannot run here: {reason}")
    capacity = _check(q, keys, values, k, v, rows)
    (batch, heads, n, head_dim), slots = q.shape, keys.codes.shape[2]
    tile = tile or TILES[min(keys.bits(head_dim), values.bits(head_dim))]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = None if log_count is None else beside_slots(log_count, keys, capacity)
    out, lse = (
        torch.empty(*q.shape, dtype=q.dtype, device=q.device),
        torch.empty(q.shape[:2], device=q.device),
    )
    where = (lse, lse) if rows is None else (rows.first.contiguous(), rows.lengths.contiguous())
    from fastar.engines.kernels import attend_packed as kernel

    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[(-(-n // tile.queries), batch * heads)](
            q, keys.codes, keys.low, keys.step, values.codes, values.low, values.step,
            lse if bias is None else bias, k, v, out, lse, *where,
            n, slots, capacity, k.shape[1], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            head_dim**-0.5 / math.log(2),
            D=head_dim, KEY_GROUP=keys.group(head_dim), KEY_BITS=keys.bits(head_dim),
            VALUE_GROUP=values.group(head_dim), VALUE_BITS=values.bits(head_dim),
            Q=tile.queries, K=tile.keys, BIASED=bias is not None, RAGGED=rows is not None, UPCAST=interpreted(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out.unflatten(0, (batch, heads)), lse.unflatten(0, (batch, heads))


def beside_slots(log_count: Tensor, slots: Packed, capacity: int | None = None) -> Tensor:
    """Log-counts [B, H, S] of packed slots in memory laid out as theirs, where the kernel reads them without a copy.

    They are returned as they are if they lie so already. `capacity`: of the slots' buffers, if it is known.
    """
    batch, heads, size = slots.codes.shape[:3]
    capacity = _capacity(slots.codes) if capacity is None else capacity
    laid_out = (heads * capacity, capacity, 1)
    if log_count.ndim == 3 and log_count.dtype == torch.float32 and log_count.stride() == laid_out:
        return log_count
    bias = torch.zeros(batch, heads, capacity, device=slots.codes.device)[..., :size]
    bias.copy_(log_count)
    return bias


def _missing(device: torch.device) -> str | None:
    """What the machine lacks, or None."""
    if find_spec("triton") is None:
        return "it needs Triton: install triton"
    if device.type != "cuda" and not interpreted():
        return f"it runs on a GPU, not on {device.type}"
    return None


def _check(q: Tensor, keys: Packed, values: Packed, k: Tensor, v: Tensor, rows: HeadRows | None) -> int:
    """Raise a ValueError unless the kernel takes these tensors; returns the slots a head that the buffers have."""
    head_dim = q.shape[3]
    if head_dim & (head_dim - 1) or not _SMALLEST <= head_dim <= _WIDEST:
        raise ValueError(f"packed slots are read for heads of 16, 32, 64 or 128 numbers, got {head_dim}")
    if not q.dtype == k.dtype == v.dtype or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q and the current k and v must have one dtype and contiguous vectors")
    lead, slots = tuple(q.shape[:2]), keys.codes.shape[2]
    if k.shape != v.shape or tuple(k.shape[:2]) != lead or k.shape[3] != head_dim:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if rows is not None:
        rows.check(lead)
        lead = (1, 1)
    capacities = set()
    for packed in (keys, values):
        group = packed.group(head_dim)
        if packed.bits(head_dim) not in (4, 8) or group & (group - 1):
            raise ValueError(
                "slots must be packed with 8 or 4 bits and a power of two of numbers to a group, got codes "
                f"{tuple(packed.codes.shape)} and steps {tuple(packed.step.shape)} for heads of {head_dim}"
            )
        for x in (packed.codes, packed.low, packed.step):
            if tuple(x.shape[:3]) != (*lead, slots):
                raise ValueError(f"packed slots must be {(*lead, slots)} and a width, got {tuple(x.shape)}")
            capacities.add(_capacity(x))
    if len(capacities) > 1:
        raise ValueError(f"packed slots must lie in buffers of one size, got {sorted(capacities)} slots")
    return capacities.pop()


def _capacity(x: Tensor) -> int:
    """Slots a head of the buffer that x [B, H, S, ...] is the beginning of."""
    batch, heads, slots, width = x.shape
    # the stride of a dimension of size 1 says nothing
    capacity = x.stride(1) // width if heads > 1 else x.stride(0) // width if batch > 1 else slots
    expected = (heads * capacity * width, capacity * width, width, 1)
    for size, stride, wanted in zip(x.shape, x.stride(), expected, strict=True):
        if size > 1 and stride != wanted:
            raise ValueError(
                f"packed slots must be contiguous, or the first slots of contiguous buffers: {tuple(x.shape)} has "
                f"strides {x.stride()}"
            )
    return capacity
