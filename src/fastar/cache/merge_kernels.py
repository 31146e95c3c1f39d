"""Triton kernels of the merges of a TempCache commit: which are done, where chains end, means of groups, holes filled.

Legend as in `fastar.cache.kernels`.
"""

# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fastar.cache.kernels import product


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
