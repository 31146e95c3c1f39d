"""The Triton kernel that gives tokens their buckets, in one trip over them."""

# Sizes are not specialised: a cache that grows would compile again, and a size of 1 would become a constant.
# Triton gives annotations a meaning of its own:
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "count"])
def codes(
    x, vectors, offset, out, n, count, x_problem, x_row, vectors_problem,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, SIGNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out int64 [N, n] of scores x.vector + offset: the highest one, the first of equals, or if SIGNS the positive as
    bits.

    x [N, n, D] with strides, the last 1; vectors [N, count, D] contiguous but for the stride of N, and of x's dtype;
    offset float32 [N, count]. count <= COUNT; WIDTH numbers are multiplied at a time. UPCAST: multiply in float32, as
    the interpreter cannot multiply bfloat16.
    """
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    each = tl.arange(0, COUNT)
    score = tl.zeros([ROWS, COUNT], tl.float32)
    for start in range(0, D, WIDTH):
        width = start + tl.arange(0, WIDTH)
        a = tl.load(
            x + problem * x_problem + row[:, None] * x_row + width[None, :],
            mask=(row < n)[:, None] & (width < D)[None, :],
            other=0,
        )
        b = tl.load(
            vectors + problem * vectors_problem + each[:, None] * D + width[None, :],
            mask=(each < count)[:, None] & (width < D)[None, :],
            other=0,
        )
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        score = tl.dot(a, tl.trans(b), score, input_precision="ieee")
    score += tl.load(offset + problem * count + each, mask=each < count, other=0)[None, :]
    known = (each < count)[None, :]
    if SIGNS:
        code = tl.sum(tl.where(known & (score > 0), 1 << each[None, :], 0), 1)
    else:
        code = tl.argmax(tl.where(known, score, float("-inf")), 1)
    tl.store(out + problem * n + row, code.to(tl.int64), mask=row < n)
