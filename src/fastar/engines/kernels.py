"""Triton kernels of the engines: attention over packed slots, and tokens moved into the order of a plan.

Legend: H heads of all batch entries, n queries, s packed slots, c keys of the current chunk, D numbers a head. A
program of attention holds a tile of Q queries of one head and streams over tiles of K packed slots, which become
vectors in registers, then over tiles of K current keys. The softmax is kept up in base 2: `top` is the largest logit so
far, `mass` the sum of 2^(logit - top).
"""

# Sizes are not specialised: a cache that grows would compile again, and a size of 1 would become a constant.
# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def unpacked(codes, low, step, row, known, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Vectors [K, D] in float32 at rows `row` [K] of packed ones: minimum + step * code, zeros where not `known`.

    codes uint8: D a row, or D / 2 with two codes each if BITS is 4, the earlier one in the low bits. low and step
    float16: one for every GROUP numbers of a row.
    """
    K: tl.constexpr = row.shape[0]
    group = tl.arange(0, D // GROUP)
    each = row[:, None] * (D // GROUP) + group[None, :]
    bottom = tl.load(low + each, mask=known[:, None], other=0).to(tl.float32)[:, :, None]
    size = tl.load(step + each, mask=known[:, None], other=0).to(tl.float32)[:, :, None]
    number = tl.arange(0, GROUP)
    if BITS == 8:
        place = each[:, :, None] * GROUP + number[None, None, :]
        code = tl.load(codes + place, mask=known[:, None, None], other=0)
    else:  # each byte is read twice: joining two halves of a row gave wrong numbers on a GPU (Triton 3.6)
        place = each[:, :, None] * (GROUP // 2) + (number // 2)[None, None, :]
        code = tl.load(codes + place, mask=known[:, None, None], other=0)
        code = (code >> (number % 2 * 4).to(tl.uint8)[None, None, :]) & 15
    x = bottom + size * code.to(tl.float32)
    return tl.reshape(x, [K, D])


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """a @ b + total; UPCAST: multiply in float32, as the interpreter cannot multiply bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def absorbed(score, values, top, mass, total, UPCAST: tl.constexpr):
    """top, mass [Q] and total [Q, D] after logits [Q, K] in base 2, -inf where there is no key, and values [K, D]."""
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be nan
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(top - base)
    total = product(weight.to(values.dtype), values, total * fade[:, None], UPCAST)
    return higher, mass * fade + tl.sum(weight, 1), total


@triton.jit(do_not_specialize=["n", "slots", "capacity", "current"])
def attend_packed(
    q, key_codes, key_low, key_step, value_codes, value_low, value_step, log_count, k, v, out, lse,
    first_row, lengths, n, slots, capacity, current, q_head, q_row, k_head, k_row, v_head, v_row, scale,
    D: tl.constexpr, KEY_GROUP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr, RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out [H, n, D] and natural log-sum-exp lse float32 [H, n] of q over packed slots, then over the current keys.

    q [H, n, D], k and v [H, c, D]: one dtype, D contiguous, the other strides given. Packed tensors: `capacity` rows a
    head, of which the first `slots` are read; if RAGGED, `lengths` int32 [H] rows from `first_row` int64 [H] on.
    log_count float32, one a row, read if BIASED. scale: of the logits, in base 2.
    """
    head = tl.program_id(1).to(tl.int64)
    start = head * capacity
    if RAGGED:
        start = tl.load(first_row + head)
        slots = tl.load(lengths + head)
    row, width = tl.program_id(0) * Q + tl.arange(0, Q), tl.arange(0, D)
    inside = row < n
    queries = tl.load(
        q + head * q_head + row[:, None] * q_row + width[None, :], mask=inside[:, None], other=0
    )
    top = tl.full([Q], float("-inf"), tl.float32)
    mass = tl.zeros([Q], tl.float32)
    total = tl.zeros([Q, D], tl.float32)
    for first in range(0, slots, K):
        column = first + tl.arange(0, K)
        known = column < slots
        place = start + column
        keys = unpacked(key_codes, key_low, key_step, place, known, D, KEY_GROUP, KEY_BITS).to(queries.dtype)
        score = product(queries, tl.trans(keys), tl.zeros([Q, K], tl.float32), UPCAST) * scale
        if BIASED:
            bias = tl.load(log_count + place, mask=known, other=float("-inf")) * 1.4426950408889634
            score += bias[None, :]
        else:
            score = tl.where(known[None, :], score, float("-inf"))
        values = unpacked(value_codes, value_low, value_step, place, known, D, VALUE_GROUP, VALUE_BITS)
        top, mass, total = absorbed(score, values.to(queries.dtype), top, mass, total, UPCAST)
    k += head * k_head
    v += head * v_head
    for first in range(0, current, K):
        column = first + tl.arange(0, K)
        known = column < current
        keys = tl.load(k + column[:, None] * k_row + width[None, :], mask=known[:, None], other=0)
        score = product(queries, tl.trans(keys), tl.zeros([Q, K], tl.float32), UPCAST) * scale
        score = tl.where(known[None, :], score, float("-inf"))
        values = tl.load(v + column[:, None] * v_row + width[None, :], mask=known[:, None], other=0)
        top, mass, total = absorbed(score, values, top, mass, total, UPCAST)
    something = mass > 0
    total = total / tl.where(something, mass, 1.0)[:, None]
    natural = tl.where(
        something, (top + tl.log2(tl.where(something, mass, 1.0))) * 0.6931471805599453, float("-inf")
    )
    place = head * n + row
    tl.store(out + place[:, None] * D + width[None, :], total.to(queries.dtype), mask=inside[:, None])
    tl.store(lse + place, natural, mask=inside)


@triton.jit(do_not_specialize=["length", "heads"])
def move_rows(
    source, order, target, length, heads, source_batch, source_head, source_row, target_batch, target_head, target_row,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Row i of target [B, H, length, D] = row order[i] of source, or the other way round if SCATTER.

    order int64 [B, H, length], permutations. D is contiguous, the other strides are given; D <= WIDTH.
    """
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // heads, problem % heads
    place, width = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = place < length
    other = tl.load(order + problem * length + place, mask=inside, other=0)
    if SCATTER:
        read, write = place, other
    else:
        read, write = other, place
    source += batch * source_batch + head * source_head
    target += batch * target_batch + head * target_head
    used = inside[:, None] & (width < D)[None, :]
    x = tl.load(source + read[:, None] * source_row + width[None, :], mask=used)
    tl.store(target + write[:, None] * target_row + width[None, :], x, mask=used)


@triton.jit(do_not_specialize=["n", "heads", "splits"])
def join_parts(
    parts, part_lse, out, lse, n, heads, splits, out_head, out_row, lse_head,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Attention over all keys from attention over each part of them: out [H, n, D] and lse float32 [H, n].

    parts [splits, n, H, D] and their natural log-sum-exps part_lse float32 [splits, H, n], both contiguous; out and lse
    by the strides given. A query without a key in any part gets zeros and -inf. D <= WIDTH.
    """
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    width = tl.arange(0, WIDTH)
    inside = row < n
    used = inside[:, None] & (width < D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(splits):
        own = tl.load(part_lse + (part * heads + head) * n + row, mask=inside, other=float("-inf"))
        top = tl.maximum(top, own)
    base = tl.where(top == float("-inf"), 0.0, top)  # no key at all: -inf - -inf would be nan
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in range(splits):
        own = tl.load(part_lse + (part * heads + head) * n + row, mask=inside, other=float("-inf"))
        weight = tl.exp(own - base)
        place = ((part * n + row) * heads + head) * D
        x = tl.load(parts + place[:, None] + width[None, :], mask=used, other=0).to(tl.float32)
        mass += weight
        total += weight[:, None] * x
    something = mass > 0
    total = total / tl.where(something, mass, 1.0)[:, None]
    natural = tl.where(something, base + tl.log(tl.where(something, mass, 1.0)), float("-inf"))
    target = out + head.to(tl.int64) * out_head + row[:, None].to(tl.int64) * out_row + width[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=used)
    tl.store(lse + head.to(tl.int64) * lse_head + row, natural, mask=inside)
