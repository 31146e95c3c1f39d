"""Triton kernels of block plans: what blocks of queries and keys share, and their means.

Legend: N problems (batch entries x heads), n queries, blocks of Q queries and K keys.
"""

# Sizes are not specialised: a cache that grows would compile again, and a size of 1 would become a constant.
# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def before(place, first, size):
    """Keys of blocks that begin at `first` [BLOCKS] and have `size` that lie before `place` [ROWS]: [ROWS, BLOCKS]."""
    inside = tl.maximum(place[:, None] - first[None, :], 0)
    return tl.minimum(inside, size[None, :])


@triton.jit(do_not_specialize=["n", "query_blocks", "key_blocks", "current"])
def shared_pairs(
    starts, ends, wildcards, out, n, query_blocks, key_blocks, current,
    Q: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WILDCARDS: tl.constexpr,
):  # fmt: skip
    """out int32 [N, query_blocks, key_blocks]: pairs of a query and a cached key in each block pair.

    starts, ends, wildcards int32 [N, n]: a query in plan order shares the cached keys from start to end, and if
    WILDCARDS the first `wildcards`. Keys begin with `current` ones of the current chunk, which do not count. A program
    does BLOCKS blocks of keys.
    """
    problem = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    edge = column * K - current
    first = tl.maximum(edge, 0)
    size = tl.maximum(edge + K, 0) - first
    count = tl.zeros([BLOCKS], tl.int32)
    for offset in range(0, Q, ROWS):
        row = block * Q + offset + tl.arange(0, ROWS)
        inside = (row < n) & (offset + tl.arange(0, ROWS) < Q)
        at = problem * n + row
        start = tl.load(starts + at, mask=inside, other=0)
        end = tl.load(ends + at, mask=inside, other=0)
        shared = before(end, first, size) - before(start, first, size)
        if WILDCARDS:
            shared += before(tl.load(wildcards + at, mask=inside, other=0), first, size)
        count += tl.sum(shared, 0)
    place = out + (problem * query_blocks + block) * key_blocks + column
    tl.store(place, count, mask=column < key_blocks)


@triton.jit(do_not_specialize=["length", "heads", "blocks"])
def block_means(
    x, order, live, out, length, heads, blocks, x_batch, x_head, x_row,
    D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out float32 [N, blocks, D]: means of x [B, H, length, D] over blocks of SIZE tokens in `order` int64 [N, length].

    Tokens from `live` int64 [N] on do not count; a block without any gets zeros. D is contiguous in x, the other
    strides are given; D <= WIDTH.
    """
    problem = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    x += problem // heads * x_batch + problem % heads * x_head
    known = tl.load(live + problem)
    width = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for offset in range(0, SIZE, ROWS):
        lane = offset + tl.arange(0, ROWS)
        place = block * SIZE + lane
        used = (lane < SIZE) & (place < length) & (place < known)
        row = tl.load(order + problem * length + place, mask=used, other=0)
        tile = tl.load(
            x + row[:, None] * x_row + width[None, :], mask=used[:, None] & (width < D)[None, :], other=0
        )
        total += tl.sum(tile.to(tl.float32), 0)
    count = tl.minimum(tl.maximum(tl.minimum(known, length) - block * SIZE, 0), SIZE)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + (problem * blocks + block) * D + width, mean, mask=width < D)


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "current"])
def choose_blocks(
    scores, live, quotas, mask, counts, indices, query_blocks, key_blocks, current,
    K: tl.constexpr, BLOCKS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The best-scored blocks of keys of each block of queries, by float32 scores [N, query_blocks, key_blocks].

    As many as `quotas` int32 [key_blocks + 1] says of the number of blocks that hold any of the `live` int64 [N] keys;
    those of the first `current` keys before all, of equal scores the earlier block. Writes uint8 `mask` like scores,
    and the same as lists: counts int32 [N, query_blocks], indices int32 like scores, ascending. key_blocks <= BLOCKS.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = problem * query_blocks + tl.program_id(0)
    column = tl.arange(0, BLOCKS)
    known = (tl.load(live + problem) + K - 1) // K
    score = tl.load(scores + row * key_blocks + column, mask=column < key_blocks, other=0)
    score = tl.where(column * K < current, float("inf"), score)
    exists = column < known
    ahead = tl.zeros([BLOCKS], tl.int32)  # blocks that are chosen before each
    for start in range(0, key_blocks, OTHERS):
        other = start + tl.arange(0, OTHERS)
        its = tl.load(scores + row * key_blocks + other, mask=other < key_blocks, other=0)
        its = tl.where(other * K < current, float("inf"), its)
        better = (its[:, None] > score[None, :]) | (
            (its[:, None] == score[None, :]) & (other[:, None] < column[None, :])
        )
        ahead += tl.sum((better & (other < known)[:, None]).to(tl.int32), 0)
    chosen = exists & (ahead < tl.load(quotas + known))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(mask + row * key_blocks + column, chosen.to(tl.uint8), mask=column < key_blocks)
    tl.store(indices + row * key_blocks + place, column, mask=chosen)
    tl.store(counts + row, tl.sum(chosen.to(tl.int32), 0))
