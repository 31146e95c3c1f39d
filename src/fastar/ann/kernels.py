"""Triton kernels of nearest-neighbour search: scores live in registers, a tile at a time, never in memory.

Legend: N problems, n queries, m keys, D features, W words of a code; S partial results a query (parts of the keys, or
hash tables). Tensors are contiguous unless a stride is given. A program holds a tile of Q queries and streams over
tiles of K keys with a running best; `merge_partials` picks the best of the S. Everywhere the first of equally good keys
wins, so that the answer does not depend on how the work was split. Scores must not be NaN: such a key is never found.
"""

# Sizes are not specialised: a cache that grows would compile again, and a size of 1 would become a constant.
# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def keep_better(best, index, score, columns):
    """Running best [Q] and its key, after scores [Q, K] of the keys `columns` [K]."""
    top = tl.max(score, 1)
    first = tl.min(tl.where(score == top[:, None], columns[None, :], 2147483647), 1)
    # where nothing was found, best is -inf and index -1, which no key is smaller than
    better = (top > best) | ((top == best) & (first < index))
    return tl.where(better, top, best), tl.where(better, first, index)


@triton.jit
def without_excluded(score, columns, low, high):
    """Scores [Q, K], -inf where key `columns` [K] lies in the query's excluded range [low, high) [Q]."""
    allowed = (columns[None, :] < low[:, None]) | (columns[None, :] >= high[:, None])
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def count_bits(x):
    """Bits set in each uint32; the compiler knows the pattern and emits one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def lower_bound(codes, wanted, m, steps):
    """First position in ascending `codes` [m] of a code >= `wanted` [Q], by bisection; m < 2^steps."""
    low = tl.zeros_like(wanted)
    high = low + m
    for _ in range(0, steps):
        middle = (low + high) // 2
        below = tl.load(codes + middle, mask=middle < high, other=2147483647) < wanted
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["rows"])
def halved_squares(
    x, valid, out, rows, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """out [rows] = -|x|^2 / 2 of x [rows, D] in float32, -inf where `valid` [rows] is 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < D)[None, :]
        part = tl.load(x + row[:, None] * D + column[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(part * part, 1)
    total = total * -0.5
    if MASKED:
        total = tl.where(tl.load(valid + row, mask=inside, other=0) != 0, total, float("-inf"))
    tl.store(out + row, total, mask=inside)


@triton.jit
def first_best(best, tile, K: tl.constexpr):
    """Best [Q] and its key of scores `best` [Q, K], each that of lane k of the tile of keys that starts at `tile`."""
    top = tl.max(best, 1)
    columns = tile + tl.arange(0, K)[None, :]
    first = tl.min(tl.where((best == top[:, None]) & (tile >= 0), columns, 2147483647), 1)
    return top, tl.where(top > float("-inf"), first, -1)


@triton.jit(do_not_specialize=["problems", "n", "m", "span"])
def nearest(
    q, k, offset, scale, excluded, best_score, best_index, problems, n, m, span,
    q_stride, k_stride, offset_stride, excluded_stride,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    INTEGER: tl.constexpr, EXCLUDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial s of a tile of queries: the key of [s * span, (s + 1) * span) with the largest scale * q.k + offset.

    q [N, n, D], k [N, m, D]: floats, or int8 if INTEGER (then products are int32, and `scale` float32 [N] is read);
    offset float32 [N, m]. The `_stride`s lie from problem to problem. excluded int32 [2, N or 1, n]: keys
    [low, high) that a query may not match, read if EXCLUDE; excluded_stride n, or 0 if all problems share them.
    best_score float32 and best_index int32 [S, N, n]; -inf and -1 where nothing was found. UPCAST: multiply in float32,
    as the interpreter cannot multiply bfloat16.

    Every lane of a tile keeps its own best over all tiles, so that lanes are compared once, at the end.
    """
    part, problem = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * Q + tl.arange(0, Q)
    inside = row < n
    q += problem * q_stride
    k += problem * k_stride
    out = problem * n + row
    start, stop = part * span, tl.minimum((part + 1) * span, m)
    if EXCLUDE:
        ends = tl.where(excluded_stride == 0, 1, problems).to(tl.int64) * n
        low = tl.load(excluded + problem * excluded_stride + row, mask=inside, other=0)
        high = tl.load(excluded + ends + problem * excluded_stride + row, mask=inside, other=m)
        if tl.max(low, 0) == 0:  # whole tiles that no query here may match are passed over
            start = tl.maximum(start, tl.min(high, 0) // K * K)
    best = tl.full([Q, K], float("-inf"), tl.float32)
    tile = tl.full([Q, K], -1, tl.int32)
    if D <= WIDTH:  # the queries stay where they are
        width = tl.arange(0, WIDTH)
        mask = inside[:, None] & (width < D)[None, :]
        held = tl.load(q + row[:, None] * D + width[None, :], mask=mask, other=0)
    for first in range(start, stop, K):
        column = first + tl.arange(0, K)
        known = column < m
        if INTEGER:
            product = tl.zeros([Q, K], tl.int32)
        else:
            product = tl.zeros([Q, K], tl.float32)
        for at in range(0, D, WIDTH):
            width = at + tl.arange(0, WIDTH)
            used = (width < D)[None, :]
            keys = tl.load(k + column[:, None] * D + width[None, :], mask=known[:, None] & used, other=0)
            if D <= WIDTH:
                queries = held
            else:
                queries = tl.load(q + row[:, None] * D + width[None, :], mask=inside[:, None] & used, other=0)
            if INTEGER:
                product = tl.dot(queries, tl.trans(keys), product, out_dtype=tl.int32)
            elif UPCAST:
                product = tl.dot(
                    queries.to(tl.float32), tl.trans(keys.to(tl.float32)), product, input_precision="ieee"
                )
            else:
                product = tl.dot(queries, tl.trans(keys), product, input_precision=PRECISION)
        if INTEGER:
            score = product.to(tl.float32) * tl.load(scale + problem)
        else:
            score = product
        score += tl.load(offset + problem * offset_stride + column, mask=known, other=float("-inf"))[None, :]
        if EXCLUDE:
            score = without_excluded(score, column, low, high)
        better = score > best  # of equal ones the first tile stays
        best, tile = tl.where(better, score, best), tl.where(better, first, tile)
    top, index = first_best(best, tile, K)
    out += part * problems.to(tl.int64) * n
    tl.store(best_score + out, top, mask=inside)
    tl.store(best_index + out, index, mask=inside)


@triton.jit(do_not_specialize=["problems", "n", "m", "probes", "steps"])
def nearest_in_buckets(
    q, k, offset, query_order, query_code, key_order, key_code, flips, excluded, best_score, best_index,
    problems, n, m, probes, steps,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    EXCLUDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial s is hash table s: of each query the best key among those in its bucket, or in one a probe leads to.

    For each table, query_order and key_order int32 [S, N, n or m] sort both sides by code; query_code and key_code
    int32 hold the codes in that order. A probe is a code with the bits `flips` int32 [probes] turned. A program's
    queries are neighbours in code, so its buckets span a short stretch of the sorted keys. The rest as in `nearest`.
    """
    table, problem = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * Q + tl.arange(0, Q)
    inside = place < n
    queries_at = (table * problems.to(tl.int64) + problem) * n
    keys_at = (table * problems.to(tl.int64) + problem) * m
    row = tl.load(query_order + queries_at + place, mask=inside, other=0)
    code = tl.load(query_code + queries_at + place, mask=inside, other=0)
    q += problem * n * D
    k += problem * m * D
    if EXCLUDE:
        low = tl.load(excluded + problem * n + row)
        high = tl.load(excluded + (problems.to(tl.int64) + problem) * n + row)
    best = tl.full([Q], float("-inf"), tl.float32)
    index = tl.full([Q], -1, tl.int32)
    for probe in range(0, probes):
        wanted = code ^ tl.load(flips + probe)
        start = tl.min(tl.where(inside, lower_bound(key_code + keys_at, wanted, m, steps), m), 0)
        stop = tl.max(tl.where(inside, lower_bound(key_code + keys_at, wanted + 1, m, steps), 0), 0)
        for first in range(start, stop, K):
            spot = first + tl.arange(0, K)
            known = spot < m
            column = tl.load(key_order + keys_at + spot, mask=known, other=0)
            found = tl.load(key_code + keys_at + spot, mask=known, other=-1)
            product = tl.zeros([Q, K], tl.float32)
            for at in range(0, D, WIDTH):
                width = at + tl.arange(0, WIDTH)
                used = (width < D)[None, :]
                keys = tl.load(k + column[:, None] * D + width[None, :], mask=known[:, None] & used, other=0)
                queries = tl.load(q + row[:, None] * D + width[None, :], mask=inside[:, None] & used, other=0)
                if UPCAST:
                    product = tl.dot(
                        queries.to(tl.float32), tl.trans(keys.to(tl.float32)), product, input_precision="ieee"
                    )
                else:
                    product = tl.dot(queries, tl.trans(keys), product, input_precision=PRECISION)
            score = product + tl.load(offset + problem * m + column, mask=known, other=float("-inf"))[None, :]
            score = tl.where(found[None, :] == wanted[:, None], score, float("-inf"))
            if EXCLUDE:
                score = without_excluded(score, column, low, high)
            best, index = keep_better(best, index, score, column)
    tl.store(best_score + queries_at + row, best, mask=inside)
    tl.store(best_index + queries_at + row, index, mask=inside)


@triton.jit(do_not_specialize=["problems", "n", "m", "span"])
def nearest_code(
    q, k, offset, excluded, best_score, best_index, problems, n, m, span,
    W: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """As `nearest`, of binary codes: the score is offset - (bits that differ), codes int32 [N, n or m, W]."""
    part, problem = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * Q + tl.arange(0, Q)
    inside = row < n
    q += problem * n * W
    k += problem * m * W
    out = problem * n + row
    start, stop = part * span, tl.minimum((part + 1) * span, m)
    if EXCLUDE:
        low = tl.load(excluded + out, mask=inside, other=0)
        high = tl.load(excluded + problems.to(tl.int64) * n + out, mask=inside, other=m)
        if tl.max(low, 0) == 0:
            start = tl.maximum(start, tl.min(high, 0) // K * K)
    best = tl.full([Q], float("-inf"), tl.float32)
    index = tl.full([Q], -1, tl.int32)
    for first in range(start, stop, K):
        column = first + tl.arange(0, K)
        known = column < m
        differ = tl.zeros([Q, K], tl.uint32)
        for word in range(0, W):
            ours = tl.load(q + row * W + word, mask=inside, other=0)
            theirs = tl.load(k + column * W + word, mask=known, other=0)
            differ += count_bits((ours[:, None] ^ theirs[None, :]).to(tl.uint32, bitcast=True))
        score = tl.load(offset + problem * m + column, mask=known, other=float("-inf"))[None, :]
        score = score - differ.to(tl.float32)
        if EXCLUDE:
            score = without_excluded(score, column, low, high)
        best, index = keep_better(best, index, score, column)
    out += part * problems.to(tl.int64) * n
    tl.store(best_score + out, best, mask=inside)
    tl.store(best_index + out, index, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_partials(scores, indices, score, index, rows, parts, BLOCK: tl.constexpr):
    """Best of the partials float32 and int32 [parts, rows] as float32 and int64 [rows]; of equals the first key."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.full([BLOCK], -1, tl.int32)
    at = row
    for _ in range(0, parts):
        value = tl.load(scores + at, mask=inside, other=float("-inf"))
        key = tl.load(indices + at, mask=inside, other=-1)
        better = (value > best) | ((value == best) & (key < found))
        best, found = tl.where(better, value, best), tl.where(better, key, found)
        at += rows
    tl.store(score + row, best, mask=inside)
    tl.store(index + row, found.to(tl.int64), mask=inside)
