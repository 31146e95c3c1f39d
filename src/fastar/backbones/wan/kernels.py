"""Triton kernels of the elementwise parts of a Wan pass: each reads and writes the residual stream once.

Legend: a row is a token, B * L of them, frame-major; D its width, held whole in registers (BLOCK, the next power of
two). Sums are float32 whatever is stored. Rows in 8 bits are e4m3 numbers and one float32 scale a row.
"""

# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def store_quantised(row, out, row_scale, column, inside, at):
    """A row [BLOCK], zeros outside, as e4m3 numbers at `at`, and its scale: 448 is the largest of them."""
    largest = tl.maximum(tl.max(tl.abs(row), 0), 1e-12)
    tl.store(row_scale, largest / 448.0)
    tl.store(out + at + column, (row * (448.0 / largest)).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm(
    x, update, gate, shift, scale, normed, row_scale, tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, GATE_STRIDE: tl.constexpr, NORM_STRIDE: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """x += gate * update in place if ADD, then normed = LayerNorm(x) * (1 + scale) + shift.

    x, update and normed [rows, D]. gate, shift and scale are those of each frame, `tokens` rows long, frames
    GATE_STRIDE and NORM_STRIDE numbers apart; unless MODULATED, scale and shift [D] are the norm's weight and bias,
    without the 1. Statistics are of x as stored. QUANTISED: normed is in 8 bits, its scales in row_scale [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = row * D
    stream = tl.load(x + at + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        change = tl.load(update + at + column, mask=inside, other=0).to(tl.float32)
        if GATED:
            change *= tl.load(gate + frame * GATE_STRIDE + column, mask=inside, other=0).to(tl.float32)
        total = (stream + change).to(x.dtype.element_ty)
        tl.store(x + at + column, total, mask=inside)
        stream = total.to(tl.float32)
    mean = tl.sum(stream, 0) / D
    centred = tl.where(inside, stream - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / D
    if MODULATED:
        scale += frame * NORM_STRIDE
        shift += frame * NORM_STRIDE
    factor = tl.load(scale + column, mask=inside, other=0).to(tl.float32)
    if MODULATED:
        factor += 1.0
    offset = tl.load(shift + column, mask=inside, other=0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt(variance + eps)) * factor + offset
    if QUANTISED:
        store_quantised(result, normed, row_scale + row, column, inside, at)
    else:
        tl.store(normed + at + column, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(x, weight, eps, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of each row of x in place: part p is its numbers [p * D, (p + 1) * D), normalised with weight [p, D].

    Rows are STRIDE numbers apart, so what lies behind the parts (values, behind queries and keys) stays as it is.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x += row * STRIDE + part * D
    values = tl.load(x + column, mask=inside, other=0).to(tl.float32)
    factor = tl.load(weight + part * D + column, mask=inside, other=0).to(tl.float32)
    result = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / D + eps)) * factor
    tl.store(x + column, result.to(x.dtype.element_ty), mask=inside)


@triton.jit
def quantise(x, out, row_scale, D: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Rows of x [rows, D] in 8 bits and their scales [rows]; if GELU, of its tanh form of them."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(x + row * D + column, mask=inside, other=0).to(tl.float32)
    if GELU:  # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        values *= tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    store_quantised(values, out, row_scale + row, column, inside, row * D)
