"""The Triton kernel that turns a pass's queries and keys and puts them where attention reads them."""

# Sizes are not specialised: a cache that grows would compile again. Strides are: those of 1 make wide loads.
# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def load_rows(x, at, row_stride, column_stride, row, column, D: tl.constexpr, L):
    """A tile [ROWS, BLOCK] of x, which begins at `at`."""
    mask = (row < L)[:, None] & (column < D)[None, :]
    return tl.load(x + at + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0)


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adjacent pairs of x [ROWS, BLOCK] turned by tables [ROWS, BLOCK / 2], in their dtype."""
    even, odd = tl.split(tl.reshape(x.to(cos.dtype), [ROWS, BLOCK // 2, 2]))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def store_rows(
    out, at, stride, row, column, x, ones, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, L
):
    """x [ROWS, BLOCK] as the first D of the W numbers of each row of `out`; behind them two `ones`, then zeros."""
    place = out + at + row[:, None] * stride
    inside = (row < L)[:, None]
    tl.store(place + column[None, :], x.to(out.dtype.element_ty), mask=inside & (column < D)[None, :])
    if W > D:
        extra = tl.arange(0, TAIL)
        value = tl.where(extra < 2, ones, 0.0) + tl.zeros_like(row)[:, None].to(tl.float32)
        tl.store(
            place + D + extra[None, :],
            value.to(out.dtype.element_ty),
            mask=inside & (extra < W - D)[None, :],
        )


@triton.jit(do_not_specialize=["L"])
def place(
    q, k, v, cos, sin, order, q_out, k_out, v_out, H, L,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    q_out_batch, q_out_head, q_out_row, k_out_batch, k_out_head, k_out_row, v_out_batch, v_out_head, v_out_row,
    D: tl.constexpr, BLOCK: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    Q_TAIL: tl.constexpr, K_TAIL: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """`fastar.attention.place.Placement` of ROWS tokens of one head; numbers named after a tensor are its strides.

    `order` is its q_order, int64 and contiguous, read if ORDERED.
    """
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    known = (row < L)[:, None] & (pair < D // 2)[None, :]
    origin = row
    if ORDERED:
        origin = tl.load(order + tl.program_id(1).to(tl.int64) * L + row, mask=row < L, other=0)
    c = tl.load(cos + origin[:, None] * (D // 2) + pair[None, :], mask=known, other=0)
    s = tl.load(sin + origin[:, None] * (D // 2) + pair[None, :], mask=known, other=0)
    x = load_rows(q, batch * q_batch + head * q_head, q_row, q_column, origin, column, D, L)
    x = turn(x, c, s, ROWS, BLOCK)
    if ORDERED:
        c = tl.load(cos + row[:, None] * (D // 2) + pair[None, :], mask=known, other=0)
        s = tl.load(sin + row[:, None] * (D // 2) + pair[None, :], mask=known, other=0)
    at = batch * q_out_batch + head * q_out_head
    store_rows(q_out, at, q_out_row, row, column, x, 1.0, D, Q_WIDTH, Q_TAIL, L)
    x = load_rows(k, batch * k_batch + head * k_head, k_row, k_column, row, column, D, L)
    x = turn(x, c, s, ROWS, BLOCK)
    at = batch * k_out_batch + head * k_out_head
    store_rows(k_out, at, k_out_row, row, column, x, 0.0, D, K_WIDTH, K_TAIL, L)
    x = load_rows(v, batch * v_batch + head * v_head, v_row, v_column, row, column, D, L)
    at = batch * v_out_batch + head * v_out_head
    store_rows(v_out, at, v_out_row, row, column, x, 0.0, D, D, 1, L)
