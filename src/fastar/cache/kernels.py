"""Triton kernels of a TempCache commit: all layers at once, nothing written twice, no atomics.

Legend: N problems (layers x batch x heads), M slots of each that may merge, R of them rows, D numbers of a key or
value, F of a feature vector, W of what the search compares. Slots and features lie `..._stride` numbers apart from
problem to problem, and `..._row` from row to row. Which program adds what, and in which order, follows from the indices
alone, so that the same input gives the same bits.
"""

# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b with float32 sums; UPCAST: multiply in float32, as the interpreter cannot multiply bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "span", "heads"])
def moments(
    x, sums, squares, rows, span, heads, batch_stride, head_stride, row_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of part p of the rows x [batch, heads, rows, D], N = batch * heads.

    sums [N, P, D]; squares [N, P, D, D] or, if not FULL, [N, P, D].
    """
    part, problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < D
    total = tl.zeros([WIDTH], tl.float32)
    if FULL:
        second = tl.zeros([WIDTH, WIDTH], tl.float32)
    else:
        second = tl.zeros([WIDTH], tl.float32)
    x += problem // heads * batch_stride + problem % heads * head_stride
    for first in range(part * span, tl.minimum((part + 1) * span, rows), BLOCK):
        row = first + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & used[None, :]
        at = row.to(tl.int64)[:, None] * row_stride
        tile = tl.load(x + at + column[None, :], mask=mask, other=0)
        wide = tile.to(tl.float32)
        total += tl.sum(wide, 0)
        if FULL:
            second += product(tl.trans(tile), tile, PRECISION, UPCAST)
        else:
            second += tl.sum(wide * wide, 0)
    out = problem * tl.num_programs(0) + part
    tl.store(sums + out * D + column, total, mask=used)
    if FULL:
        at = out * D * D + column[:, None] * D + column[None, :]
        tl.store(squares + at, second, mask=used[:, None] & used[None, :])
    else:
        tl.store(squares + out * D + column, second, mask=used)


@triton.jit
def cholesky(moment, factor, D: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr):
    """factor [N, D, D] = SCALE * L of moment [N, D, D] = L L^T, column by column in registers, one program a matrix.

    Where the moment is not positive definite: SCALE * the root of its diagonal.
    """
    problem = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, WIDTH)
    inside = (row[:, None] < D) & (row[None, :] < D)
    at = problem * D * D + row[:, None] * D + row[None, :]
    left = tl.load(moment + at, mask=inside, other=0)
    roots = tl.sqrt(tl.maximum(tl.sum(tl.where(row[:, None] == row[None, :], left, 0), 0), 0))
    good = 1
    for step in range(0, D):
        column = tl.sum(tl.where(row[None, :] == step, left, 0), 1)
        pivot = tl.sum(tl.where(row == step, column, 0), 0)
        good = tl.where(pivot > 0, good, 0)
        column = tl.where(row >= step, column / tl.sqrt(tl.maximum(pivot, 1e-30)), 0)
        tl.store(factor + problem * D * D + row * D + step, column * SCALE, mask=row < D)
        left -= column[:, None] * column[None, :]
    if good == 0:
        tl.debug_barrier()  # other threads wrote these numbers above
        diagonal = tl.where(row[:, None] == row[None, :], roots[None, :], 0)
        tl.store(factor + at, diagonal * SCALE, mask=inside)


@triton.jit(do_not_specialize=["size"])
def features(
    key, value, key_mean, value_mean, factor, value_scale, projection, out, searched, offset, size,
    key_stride, key_row, value_stride, value_row,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    PROJECT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [N, M, 2 D] = [(key - mean) factor; (value - mean) value_scale] of slots key, value [N, M, D].

    What the search compares is `searched` [N, M, W] = out projection [2 D, W] if PROJECT, else out itself; its
    offset [N, M] = -|.|^2 / 2 is of the rounded numbers.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    used = column < D
    mask = (row < size)[:, None] & used[None, :]
    square = used[:, None] & used[None, :]
    root = tl.load(factor + problem * D * D + column[:, None] * D + column[None, :], mask=square, other=0)
    mean = tl.load(key_mean + problem * D + column, mask=used, other=0)
    at = problem * key_stride + row[:, None] * key_row + column[None, :]
    keys = tl.load(key + at, mask=mask, other=0).to(tl.float32) - mean[None, :]
    keys = product(tl.where(mask, keys, 0), root, PRECISION, UPCAST).to(out.dtype.element_ty)
    mean = tl.load(value_mean + problem * D + column, mask=used, other=0)
    at = problem * value_stride + row[:, None] * value_row + column[None, :]
    values = (tl.load(value + at, mask=mask, other=0).to(tl.float32) - mean[None, :]) * tl.load(
        value_scale + problem
    )
    values = tl.where(mask, values, 0).to(out.dtype.element_ty)
    to = problem * size * 2 * D + row[:, None] * (2 * D) + column[None, :]
    tl.store(out + to, keys, mask=mask)
    tl.store(out + to + D, values, mask=mask)
    if PROJECT:
        few = tl.arange(0, W)
        at = column[:, None] * W + few[None, :]
        upper = tl.load(projection + at, mask=used[:, None], other=0)
        lower = tl.load(projection + D * W + at, mask=used[:, None], other=0)
        seen = product(keys, upper, PRECISION, UPCAST) + product(values, lower, PRECISION, UPCAST)
        seen = seen.to(searched.dtype.element_ty)
        to = problem * size * W + row[:, None] * W + few[None, :]
        tl.store(searched + to, seen, mask=(row < size)[:, None])
        seen = seen.to(tl.float32)
        norm = tl.sum(seen * seen, 1)
    else:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
        norm = tl.sum(keys * keys, 1) + tl.sum(values * values, 1)
    tl.store(offset + problem * size + row, norm * -0.5, mask=row < size)


@triton.jit(do_not_specialize=["size"])
def project(
    key, value, key_mean, value_mean, key_map, value_map, out, offset, size,
    key_stride, key_row, value_stride, value_row,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [N, M, W] = (key - mean) key_map + (value - mean) value_map of slots [N, M, D]; maps [N, D, W].

    offset [N, M] = -|out|^2 / 2, of the rounded numbers.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    column = tl.arange(0, WIDTH)
    used = column < D
    mask = inside[:, None] & used[None, :]
    few = tl.arange(0, W)
    entry = problem * D * W + column[:, None] * W + few[None, :]
    kind = key_map.dtype.element_ty
    mean = tl.load(key_mean + problem * D + column, mask=used, other=0)
    keys = tl.load(key + problem * key_stride + row[:, None] * key_row + column[None, :], mask=mask, other=0)
    keys = (keys.to(tl.float32) - mean[None, :]).to(kind)
    seen = product(keys, tl.load(key_map + entry, mask=used[:, None], other=0), PRECISION, UPCAST)
    mean = tl.load(value_mean + problem * D + column, mask=used, other=0)
    at = problem * value_stride + row[:, None] * value_row + column[None, :]
    values = tl.load(value + at, mask=mask, other=0)
    values = (values.to(tl.float32) - mean[None, :]).to(kind)
    seen += product(values, tl.load(value_map + entry, mask=used[:, None], other=0), PRECISION, UPCAST)
    seen = seen.to(out.dtype.element_ty)
    tl.store(out + problem * size * W + row[:, None] * W + few[None, :], seen, mask=inside[:, None])
    seen = seen.to(tl.float32)
    tl.store(offset + problem * size + row, tl.sum(seen * seen, 1) * -0.5, mask=inside)


@triton.jit
def scores(held, keys, offsets, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """q.k + offset [Q, K] of rows held [Q, W] and keys [K, W]."""
    return product(held, tl.trans(keys), PRECISION, UPCAST) + offsets[None, :]


@triton.jit
def with_tile(score, tile, MASK: tl.constexpr):
    """Scores whose lowest bits are the number of their tile: the larger of two then says where it is from."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits & ~MASK) | tile).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["size", "known", "frame", "least"])
def nearest_newer(
    x, offset, found, size, known, frame, least,
    F: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """found int32 [N, M]: the slot with the largest x_i.x_j + offset_j among those that entered, in a later frame.

    x [N, M, F], offset [N, M]. Slots from `known` on entered, in frames of `frame`; those before known + least are not
    searched. Scores keep all but the lowest bits, MASK of them, which say in which tile of K slots the best of each
    lane was: of scores that agree in the rest, which wins is fixed but arbitrary. Lanes are compared once, at the end.
    """
    nowhere = -3.0e38
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * Q + tl.arange(0, Q)
    inside = row < size - frame  # the newest frame has nothing newer
    entered = size - known
    x += problem * size * F
    offset += problem * size
    column = tl.arange(0, WIDTH)
    used = (column < F)[None, :]
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    held = tl.load(x + at, mask=inside[:, None] & used, other=0)
    low = tl.where(row < known, 0, (row - known) // frame * frame + frame)
    low = tl.minimum(tl.maximum(low, least), entered)
    lane = tl.arange(0, K)
    best = tl.full([Q, K], nowhere, tl.float32)
    x += known.to(tl.int64) * F
    offset += known
    start = tl.min(tl.where(inside, low, entered), 0) // K * K
    clear = tl.minimum((tl.max(tl.where(inside, low, 0), 0) + K - 1) // K * K, entered // K * K)
    for first in range(start, clear, K):  # some of these are no later frame to some rows
        slot = first + lane
        keys = tl.load(x + slot[:, None] * F + column[None, :], mask=used, other=0)
        score = scores(held, keys, tl.load(offset + slot), PRECISION, UPCAST)
        score = tl.where(slot[None, :] >= low[:, None], score, nowhere)
        best = tl.maximum(best, with_tile(score, first // K, MASK))
    begin = tl.maximum(start, clear)
    offsets = tl.load(offset + begin + lane, mask=begin + lane < entered, other=0)
    for first in range(begin, entered // K * K, K):
        slot = first + lane
        keys = tl.load(x + slot[:, None] * F + column[None, :], mask=used, other=0)
        ahead = tl.load(
            offset + slot + K, mask=slot + K < entered, other=0
        )  # read while this tile is multiplied
        score = scores(held, keys, offsets, PRECISION, UPCAST)
        best = tl.maximum(best, with_tile(score, first // K, MASK))
        offsets = ahead
    slot = entered // K * K + lane
    there = slot < entered
    keys = tl.load(x + slot[:, None] * F + column[None, :], mask=there[:, None] & used, other=0)
    score = scores(held, keys, offsets, PRECISION, UPCAST)
    score = tl.where(there[None, :] & (slot[None, :] >= low[:, None]), score, nowhere)
    best = tl.maximum(best, with_tile(score, entered // K, MASK))

    top = tl.max(best, 1)
    slot = (best.to(tl.int32, bitcast=True) & MASK) * K + lane[None, :]
    first_best = tl.min(tl.where(best == top[:, None], slot, 2147483647), 1)
    index = tl.where(inside & (top > -1.0e38), known + first_best, -1)
    tl.store(found + problem * size + row, index, mask=row < size)


@triton.jit
def pair_cost(here, x, count, own, other, column, used, F: tl.constexpr, WEIGHTING: tl.constexpr):
    """Cost [Q] of merging rows here [Q, F], which stand for `own` [Q] tokens, into slots `other` [Q]; inf where -1."""
    known = other >= 0
    to = tl.where(known, other, 0).to(tl.int64)
    there = tl.load(x + to[:, None] * F + column[None, :], mask=known[:, None] & used[None, :], other=0)
    difference = tl.where(known[:, None], there.to(tl.float32) - here, 0)
    newer = tl.load(count + to, mask=known, other=1)
    ward = own * newer / tl.maximum(own + newer, 1)
    if WEIGHTING == "ward":
        weight = ward
    elif WEIGHTING == "root_ward":
        weight = tl.sqrt(ward)
    elif WEIGHTING == "older":
        weight = own
    else:
        weight = own * 0 + 1
    cost = weight * tl.sum(difference * difference, 1)
    return tl.where(known, cost, float("inf"))


@triton.jit(do_not_specialize=["size", "count_of_rows"])
def cheaper_partner(
    x, count, rows, partner, found, best, cost, size, count_of_rows,
    F: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTING: tl.constexpr,
    ROWS: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    """Of slots i = rows [N, R] (or 0 .. R - 1, if not ROWS) the cost of the partner, and of `found` if FOUND.

    Features x [N, M, F], tokens count [N, M]; partner, found int32 [N, R], newer slots or -1. best int32 and cost
    [N, R]: the cheaper of the two, the old partner of equals.
    """
    problem = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count_of_rows
    column = tl.arange(0, WIDTH)
    used = column < F
    at = problem * count_of_rows + place
    x += problem * size * F
    count += problem * size
    if ROWS:
        row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    else:
        row = place.to(tl.int64)
    here = tl.load(x + row[:, None] * F + column[None, :], mask=inside[:, None] & used[None, :], other=0)
    here = here.to(tl.float32)
    own = tl.load(count + row, mask=inside, other=1)
    chosen = tl.load(partner + at, mask=inside, other=-1)
    least = pair_cost(here, x, count, own, chosen, column, used, F, WEIGHTING)
    if FOUND:
        other = tl.load(found + at, mask=inside, other=-1)
        price = pair_cost(here, x, count, own, other, column, used, F, WEIGHTING)
        better = price < least
        chosen, least = tl.where(better, other, chosen), tl.where(better, price, least)
        tl.store(best + at, chosen, mask=inside)
    tl.store(cost + at, least, mask=inside)
