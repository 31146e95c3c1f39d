"""Attention over packed slots, under Triton's interpreter and on a GPU, against the reference on unpacked ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.cache.slots import SlotFormat
from fastar.engines.packed import HeadRows, Packed, Tile, attend_packed

from .conftest import Draw
from .test_engines import TOLERANCE, relative_error

SMALL = Tile(queries=16, keys=16, warps=4, stages=2)


def packed(x: Tensor, form: SlotFormat, capacity: int) -> tuple[Packed, Tensor]:
    """x [B, H, S, D] in the first slots of buffers that hold rubbish behind them, and what the codes stand for."""
    fields = form.pack("x", x)
    kept = []
    for field in fields.values():
        rubbish = 255 if field.dtype == torch.uint8 else torch.nan
        buffer = torch.full(
            (*x.shape[:2], capacity, field.shape[3]), rubbish, dtype=field.dtype, device=x.device
        )
        buffer[:, :, : x.shape[2]] = field
        kept.append(buffer[:, :, : x.shape[2]])
    return Packed(*kept), form.unpack("x", fields, x.dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4)], ids=str)
@pytest.mark.parametrize(
    ("heads", "queries", "slots", "current", "dim", "group"),
    [
        ((2, 2), 21, 37, 19, 32, 16),
        ((1, 3), 16, 32, 16, 16, 16),
        ((1, 2), 9, 5, 3, 64, 64),
        ((1, 1), 5, 20, 7, 32, 8),
    ],
)
def test_equals_the_reference(
    draw: Draw, heads: tuple[int, int], queries: int, slots: int, current: int, dim: int, group: int,
    bits: tuple[int, int], biased: bool, device: torch.device,
) -> None:  # fmt: skip
    draw = dataclasses.replace(draw, device=device)
    q, k, v = (draw.normal(*heads, n, dim) for n in (queries, current, current))
    keys, k_past = packed(draw.normal(*heads, slots, dim), SlotFormat(bits[0], group=group), 41)
    values, v_past = packed(draw.normal(*heads, slots, dim), SlotFormat(bits[1], group=group), 41)
    log_count = draw.log_count(*heads, slots) if biased else None
    out, lse = attend_packed(q, keys, values, k, v, log_count=log_count, tile=SMALL)
    counts = torch.zeros(*heads, slots + current, device=device)
    if log_count is not None:
        counts[..., :slots] = log_count
    whole = (q, torch.cat([k_past, k], 2), torch.cat([v_past, v], 2))
    expected, natural = engines.attend(*whole, log_count=counts, engine="reference", return_lse=True)
    # on a GPU the products of float32 are those of tf32
    tolerance = 1e-5 if device.type == "cpu" else 2e-3
    assert relative_error(out, expected) < tolerance
    torch.testing.assert_close(lse, natural, rtol=tolerance, atol=tolerance)


def test_bfloat16_and_strided_vectors(draw: Draw, device: torch.device) -> None:
    """As a backbone gives them: [B, L, H, D] in memory."""
    draw = dataclasses.replace(draw, device=device, dtype=torch.bfloat16)
    q, k, v = (draw.normal(2, n, 3, 64).transpose(1, 2) for n in (20, 18, 18))
    keys, k_past = packed(draw.normal(2, 3, 37, 64), SlotFormat(8), 40)
    values, v_past = packed(draw.normal(2, 3, 37, 64), SlotFormat(4), 40)
    out, _ = attend_packed(q, keys, values, k, v, tile=SMALL)
    whole = [x.float() for x in (q, torch.cat([k_past, k], 2), torch.cat([v_past, v], 2))]
    expected, _ = engines.attend(*whole, engine="reference")
    # the interpreter cuts numbers off where the GPU rounds them
    tolerance = TOLERANCE[torch.bfloat16] * (3 if device.type == "cpu" else 1)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < tolerance


def test_nothing_to_attend_to(draw: Draw) -> None:
    q, none = draw.normal(1, 2, 5, 16), draw.normal(1, 2, 0, 16)
    slots, _ = packed(draw.normal(1, 2, 20, 16), SlotFormat(8, group=16), 20)
    log_count = torch.zeros(1, 2, 20)
    log_count[0, 1] = -torch.inf
    out, lse = attend_packed(q, slots, slots, none, none, log_count=log_count, tile=SMALL)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == -torch.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[0, 0]).all() and (out[0, 0] != 0).any()


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("bits", [8, 4])
def test_heads_with_slots_of_their_own(draw: Draw, bits: int, biased: bool, device: torch.device) -> None:
    """One after the other in rows that all share, with rubbish between them; a head may have none."""
    draw, lengths = dataclasses.replace(draw, device=device), [[37, 0, 5], [16, 33, 1]]
    form, total = SlotFormat(bits, group=16), 150
    sizes = [length for row in lengths for length in row]
    starts = [3 + sum(sizes[:place]) + 2 * place for place in range(len(sizes))]
    keys, k_rows = packed(draw.normal(1, 1, total, 32), form, total)
    values, v_rows = packed(draw.normal(1, 1, total, 32), form, total)
    log_count = draw.log_count(1, 1, total).clamp_min(0) if biased else None
    used = torch.zeros(total, dtype=torch.bool, device=device)
    for start, size in zip(starts, sizes, strict=True):
        used[start : start + size] = True
    for field in (keys.low, keys.step, values.low, values.step):
        field[:, :, ~used] = torch.nan
    first = torch.tensor(starts, device=device).view(2, 3)
    rows = HeadRows(first, torch.tensor(lengths, dtype=torch.int32, device=device))
    q, k, v = (draw.normal(2, 3, n, 32) for n in (21, 19, 19))
    out, lse = attend_packed(q, keys, values, k, v, log_count=log_count, rows=rows, tile=SMALL)
    tolerance = 1e-5 if device.type == "cpu" else 2e-3
    for place, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        batch, head, part = place // 3, place % 3, slice(start, start + size)
        whole = [
            torch.cat([old[0, 0, part], new[batch, head]])[None, None]
            for old, new in ((k_rows, k), (v_rows, v))
        ]
        counts = torch.zeros(1, 1, size + 19, device=device)
        if log_count is not None:
            counts[..., :size] = log_count[..., part]
        own = q[batch, head][None, None]
        expected, natural = engines.attend(own, *whole, log_count=counts, engine="reference", return_lse=True)
        assert relative_error(out[batch, head], expected) < tolerance
        torch.testing.assert_close(lse[batch, head], natural[0, 0], rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"lengths int32, both \[batch, heads\] = \(2, 3\)"):
        attend_packed(q, keys, values, k, v, rows=HeadRows(rows.first, rows.lengths.long()), tile=SMALL)


def test_what_the_kernel_does_not_take(draw: Draw) -> None:
    q = draw.normal(1, 2, 5, 32)
    slots, _ = packed(draw.normal(1, 2, 20, 32), SlotFormat(8, group=16), 24)
    others, _ = packed(draw.normal(1, 2, 20, 32), SlotFormat(8, group=16), 25)
    with pytest.raises(ValueError, match=r"buffers of one size, got \[24, 25\]"):
        attend_packed(q, slots, others, q, q)
    with pytest.raises(ValueError, match="heads of 16, 32, 64 or 128 numbers, got 24"):
        attend_packed(q[..., :24], slots, slots, q, q)
    with pytest.raises(ValueError, match="one dtype"):
        attend_packed(q, slots, slots, q.bfloat16(), q)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        attend_packed(q, Packed(slots.codes[..., :8], slots.low, slots.step), slots, q, q)
    turned = Packed(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in dataclasses.astuple(slots)))
    with pytest.raises(ValueError, match="must be contiguous"):
        attend_packed(q, turned, turned, q, q)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_geometry_of_wan(draw: Draw, bits: int, group: int) -> None:
    """With the tile that is used there, and the groups of caches (128) and of the benchmark."""
    draw = dataclasses.replace(draw, device=torch.device("cuda"), dtype=torch.bfloat16)
    q, k, v = (draw.normal(1, 12, n, 128) for n in (700, 700, 700))
    form = SlotFormat(bits, group=group)
    keys, k_past = packed(draw.normal(1, 12, 3000, 128), form, 4000)
    values, v_past = packed(draw.normal(1, 12, 3000, 128), form, 4000)
    log_count = draw.log_count(1, 12, 3000)
    out, _ = attend_packed(q, keys, values, k, v, log_count=log_count)
    counts = torch.zeros(1, 12, 3700, device="cuda")
    counts[..., :3000] = log_count
    whole = [x.float() for x in (q, torch.cat([k_past, k], 2), torch.cat([v_past, v], 2))]
    expected, _ = engines.attend(*whole, log_count=counts, engine="reference")
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]
