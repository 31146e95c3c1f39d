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


@triton.jit
def sort_key(cost, gone, at, mask, GONE: tl.constexpr):
    """Costs as whole numbers below 2^32 that are in the same order; slots that are gone, or masked, are last."""
    bits = tl.load(cost + at, mask=mask, other=0).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    if GONE:
        key = tl.where(tl.load(gone + at, mask=mask, other=1) != 0, 4294967295, key)
    return tl.where(mask, key, 4294967296)


@triton.jit(do_not_specialize=["size", "number"])
def lowest(cost, gone, chosen, rows, size, number, BLOCK: tl.constexpr, GONE: tl.constexpr):
    """The `number` lowest of cost [N, M], of equals the first: chosen uint8 [N, M], and rows int32 [N, R] ascending.

    Those of which `gone` uint8 [N, M] is set come last. The threshold is found two bits at a time, from the highest: it
    lies behind all slots that agree in the bits so far and have a lower digit, as long as these are fewer than wanted.
    M is below 2^21.
    """
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * size
    gone += problem * size
    chosen += problem * size
    rows += problem * number
    inner = tl.arange(0, BLOCK)
    threshold = tl.zeros([1], tl.int64)
    left = tl.zeros([1], tl.int64) + number
    one, ones = tl.full([1], 1, tl.int64), tl.full([BLOCK], 1, tl.int64)
    for step in range(0, 16):
        bit = 30 - 2 * step
        counts = tl.zeros(
            [BLOCK], tl.int64
        )  # of slots whose next two bits are 0, 1 and 2: three fields of 21 bits
        for first in range(0, size, BLOCK):
            at = first + inner
            key = sort_key(cost, gone, at, at < size, GONE)
            digit = (key >> bit) - (threshold >> bit)
            fits = (digit >= 0) & (digit < 3)
            counts += tl.where(fits, ones << tl.where(fits, 21 * digit, 0), 0)
        total = tl.sum(counts, 0)
        for field in tl.static_range(3):
            count = (total >> (21 * field)) & 0x1FFFFF
            over = (left > count) & (threshold >> bit & 3 == field)
            left = tl.where(over, left - count, left)
            threshold = tl.where(over, threshold + (one << bit), threshold)
    taken = tl.zeros([1], tl.int32)
    equals = tl.zeros([1], tl.int32)
    for first in range(0, size, BLOCK):
        at = first + inner
        key = sort_key(cost, gone, at, at < size, GONE)
        equal = (key == threshold).to(tl.int32)
        order = tl.cumsum(equal, 0) + equals
        take = (key < threshold) | ((equal != 0) & (order <= left))
        flag = take.to(tl.int32)
        place = tl.cumsum(flag, 0) + taken - 1
        tl.store(chosen + at, flag.to(tl.uint8), mask=at < size)
        tl.store(rows + place, at, mask=take & (at < size))
        taken += tl.sum(flag, 0)
        equals += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["size", "number"])
def places(flags, rows, size, number, BLOCK: tl.constexpr, WANTED: tl.constexpr):
    """rows int32 [N, R], ascending: where `flags` uint8 [N, M] are 1 if WANTED, else 0; there are `number` of them."""
    problem = tl.program_id(0).to(tl.int64)
    flags += problem * size
    rows += problem * number
    before = tl.zeros([1], tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        take = (tl.load(flags + at, mask=at < size, other=1 - WANTED) != 0).to(tl.int32) == WANTED
        place = tl.cumsum(take.to(tl.int32), 0) + before - 1
        tl.store(rows + place, at, mask=take & (at < size))
        before += tl.sum(take.to(tl.int32), 0)


@triton.jit(do_not_specialize=["size", "hops"])
def find_roots(chosen, partner, root, size, hops, BLOCK: tl.constexpr):
    """root int32 [N, M]: where the chain of merges that starts at each slot ends, or where it is after `hops` of them.

    A slot with `chosen` uint8 [N, M] set and a partner int32 [N, M] >= 0 merges into that; others end chains. They
    are acyclic, and may be as long as there are slots: a second call hops along what the first one found.
    """
    problem = tl.program_id(1).to(tl.int64)
    chosen += problem * size
    partner += problem * size
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size
    here = slot
    moving = inside
    left = hops
    while left > 0:
        to = tl.load(partner + here, mask=moving, other=-1)
        moving = moving & (tl.load(chosen + here, mask=moving, other=0) != 0) & (to >= 0) & (to != here)
        here = tl.where(moving, to, here)
        left = tl.where(tl.max(moving.to(tl.int32), 0) > 0, left - 1, 0)
    tl.store(root + problem * size + slot, here, mask=inside)


@triton.jit(do_not_specialize=["moved"])
def fold(
    x, count, order, target, total, moved, x_stride, x_row, count_stride, FIRST: tl.constexpr,
    F: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOTAL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each group's mean, weighted by count [N, M], is written over its root's row of x [N, M, F], from column FIRST on.

    order int32 [N, R] are the slots that may move, sorted by `target` int32 [N, R], where they end; a slot that is its
    own target stays. TOTAL: the group's count goes to `total` [N, M] (not `count`, which others read). A program takes
    BLOCK places and sums the runs of equal targets among them by a product with 0 or count; what the first run has in
    blocks before is added by the program in whose block it ends. Roots do not move and each is written by one program,
    so none reads what another writes.
    """
    problem = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    inner = tl.arange(0, BLOCK)
    place = first + inner
    order += problem * moved
    target += problem * moved
    x += problem * x_stride
    count += problem * count_stride
    inside = place < moved
    goal = tl.load(target + place, mask=inside, other=-1)
    after = tl.load(target + place + 1, mask=place + 1 < moved, other=-1)
    own = tl.load(order + place, mask=inside, other=0)
    ends = inside & (goal != after) & (own != goal)
    column = FIRST + tl.arange(0, WIDTH)
    used = column < F
    few = tl.load(count + own, mask=inside, other=0)
    reads = inside[:, None] & used[None, :]
    rows = tl.load(x + own.to(tl.int64)[:, None] * x_row + column[None, :], mask=reads, other=0)
    share = tl.where(goal[:, None] == goal[None, :], few[None, :], 0)
    sums = product(share, rows.to(tl.float32), PRECISION, UPCAST)
    weight = tl.sum(share, 1)

    run = tl.load(target + first)
    before = tl.load(target + first - 1, mask=first > 0, other=-1)
    more = (before == run) & (tl.max((ends & (goal == run)).to(tl.int32), 0) > 0)
    earlier = tl.zeros([WIDTH], tl.float32)
    earlier_weight = 0.0
    while more:
        first -= BLOCK
        spot = first + inner
        member = tl.load(target + spot, mask=spot >= 0, other=-1) == run
        slot = tl.load(order + spot, mask=member, other=0).to(tl.int64)
        few = tl.load(count + slot, mask=member, other=0)
        reads = member[:, None] & used[None, :]
        rows = tl.load(x + slot[:, None] * x_row + column[None, :], mask=reads, other=0)
        earlier += tl.sum(rows.to(tl.float32) * few[:, None], 0)
        earlier_weight += tl.sum(few, 0)
        more = tl.min(member.to(tl.int32), 0) > 0
    sums += tl.where((goal == run)[:, None], earlier[None, :], 0)
    weight += tl.where(goal == run, earlier_weight, 0)

    # not where(ends, goal, 0), with which Triton 3.6 does not compile
    root = tl.maximum(goal, 0).to(tl.int64)
    mask = ends[:, None] & used[None, :]
    own_weight = tl.load(count + root, mask=ends, other=1)
    row = tl.load(x + root[:, None] * x_row + column[None, :], mask=mask, other=0).to(tl.float32)
    weight += own_weight
    mean = (sums + row * own_weight[:, None]) / weight[:, None]
    tl.store(x + root[:, None] * x_row + column[None, :], mean.to(x.dtype.element_ty), mask=mask)
    if TOTAL:
        tl.store(total + problem * count_stride + root, weight, mask=ends)


@triton.jit(do_not_specialize=["first", "moved"])
def fill(
    x, place, first, moved, x_stride, x_row,
    F: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots first .. first + R - 1 of x [N, M, F] move, in place, to slots `place` int32 [N, R] before them, unless -1.

    No two have the same place, so that nothing is read where something is written.
    """
    problem = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    to = tl.load(place + problem * moved + slot, mask=slot < moved, other=-1).to(tl.int64)
    mask = (to >= 0)[:, None] & (column < F)[None, :]
    x += problem * x_stride + column[None, :]
    rows = tl.load(x + (first + slot).to(tl.int64)[:, None] * x_row, mask=mask)
    tl.store(x + to[:, None] * x_row, rows, mask=mask)
