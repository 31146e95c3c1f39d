"""Compiles every kernel of fastar.ann for an H100 (sm_90), with the tiles used there; prints what each takes.

Run as a program: `python -m tests.ann.compile_kernels`. Fails if a kernel does not compile, takes more shared memory
than a block may have, spills registers, or does without the instructions it was written for.
"""

from fastar.ann import bucket_kernels, kernels
from fastar.ann.codes import ROWS, WIDTH
from fastar.ann.launch import BUCKET_TILES, CODE_TILE, TILES, WIDE_TILE, Tile
from tests import hopper
from tests.hopper import report

POINTERS = {
    "q": None, "k": None, "x": None, "offset": "fp32", "scale": "fp32", "excluded": "i32", "valid": "u8",
    "best_score": "fp32", "best_index": "i32", "query_order": "i32", "query_code": "i32", "key_order": "i32",
    "key_code": "i32", "flips": "i32", "scores": "fp32", "indices": "i32", "score": "fp32", "index": "i64",
    "out": "fp32",
}  # fmt: skip


def compiled(kernel, dtype: str, tile: Tile, **constants):  # type: ignore[no-untyped-def]
    """The kernel with features of `dtype` and tiles of `tile`; other arguments are pointers as above, or int32."""
    constants |= {"Q": tile.queries, "K": tile.keys, "WIDTH": tile.width}
    types = {name: f"*{kind or dtype}" for name, kind in POINTERS.items()}
    return hopper.compiled(kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)


def main() -> None:
    """All kernels, in the forms in which `fastar.ann.launch` launches them."""
    flags = {"D": 256, "EXCLUDE": True, "UPCAST": False}
    for dtype, size, precision, wanted in (
        ("bf16", 2, "ieee", "wgmma.*bf16"),
        ("fp32", 4, "ieee", "fma"),
        ("fp32", 4, "tf32x3", "wgmma.*tf32"),
        ("i8", 1, "ieee", "wgmma.*s8"),
    ):
        kernel = kernels.nearest
        result = compiled(kernel, dtype, TILES[size], INTEGER=dtype == "i8", PRECISION=precision, **flags)
        report(f"nearest {dtype} {precision}", result, wanted)
    wide = {**flags, "D": 3072, "INTEGER": False, "PRECISION": "ieee"}
    report("nearest bf16, wide", compiled(kernels.nearest, "bf16", WIDE_TILE, **wide), "wgmma.*bf16")
    for dtype, size, wanted in (("bf16", 2, "wgmma.*bf16"), ("fp32", 4, "fma")):
        result = compiled(kernels.nearest_in_buckets, dtype, BUCKET_TILES[size], PRECISION="ieee", **flags)
        report(f"buckets {dtype}", result, wanted)
    report("nearest_code", compiled(kernels.nearest_code, "i32", CODE_TILE, W=8, EXCLUDE=True), "popc")
    squares = compiled(kernels.halved_squares, "bf16", TILES[2], D=256, BLOCK=64, MASKED=True)
    report("halved_squares", squares, "ld.global")
    types = {"x": "*bf16", "vectors": "*bf16", "offset": "*fp32", "out": "*i64"}
    for signs, count in ((True, 16), (False, 32), (False, 128)):
        constants = {"D": 128, "WIDTH": WIDTH, "ROWS": ROWS, "COUNT": count, "SIGNS": signs, "UPCAST": False}
        result = hopper.compiled(
            bucket_kernels.codes, types, constants, ("x_problem", "x_row", "vectors_problem")
        )
        report(f"codes of {count}, signs={signs}", result, "mma.*bf16")
    report("merge_partials", compiled(kernels.merge_partials, "fp32", TILES[4], BLOCK=256), "ld.global")


if __name__ == "__main__":
    main()
