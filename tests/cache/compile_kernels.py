"""Compiles every kernel of fastar.cache for an H100 (sm_90) as `fused` and `fused_merge` launch it; prints its needs.

Run as a program: `python -m tests.cache.compile_kernels`. Fails as `tests.hopper.report` says.
"""

from typing import Any

from fastar.cache import kernels, merge_kernels
from tests import hopper
from tests.hopper import report

FLOATS = {
    "sums", "squares", "moment", "factor", "key_mean", "value_mean", "value_scale", "offset", "cost",
    "count", "total",
}  # fmt: skip
VECTORS = {"key_map", "value_map", "x", "key", "value", "projection", "out", "searched"}
INDICES = {"place", "rows", "partner", "found", "best", "root", "order", "target"}
FLAGS = {"flags", "gone", "chosen"}
STRIDES = {
    "batch_stride", "head_stride", "row_stride", "key_stride", "key_row", "value_stride", "value_row", "x_stride",
    "x_row",
}  # fmt: skip


def compiled(
    kernel: Any, warps: int, *, numbers: tuple[str, ...] = (), x: str = "*bf16", **constants: Any
) -> Any:
    """The kernel with 16-bit vectors, x of type `x`; names in `numbers` are whole numbers here, not pointers."""
    types = (
        dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(VECTORS, "*bf16") | dict.fromkeys(INDICES, "*i32")
        | dict.fromkeys(FLAGS, "*u8") | {"x": x} | dict.fromkeys(numbers, "i32")
    )  # fmt: skip
    return hopper.compiled(kernel, types, constants, STRIDES, num_warps=warps)


def main() -> None:
    """All kernels, in bfloat16 at Wan's head of 128."""
    head = {"D": 128, "WIDTH": 128, "PRECISION": "tf32", "UPCAST": False}
    for full, wanted in ((True, "wgmma.*bf16"), (False, "ld.global")):
        constants = {"BLOCK": 64, "FULL": full, **head}
        report(f"moments, full={full}", compiled(kernels.moments, 8, numbers=("rows",), **constants), wanted)
    report("cholesky", compiled(kernels.cholesky, 16, D=128, WIDTH=128, SCALE=128**-0.5), "sqrt")
    for project in (False, True):
        constants = {"BLOCK": 64, "PROJECT": project, "W": 64, **head}
        report(f"features, project={project}", compiled(kernels.features, 8, **constants), "tf32")
    constants = {"BLOCK": 128, "W": 64, **head}
    report("project", compiled(kernels.project, 8, **constants), "wgmma.*bf16")
    for width, warps in ((32, 4), (64, 4), (256, 8)):
        constants = {
            "F": width,
            "WIDTH": width,
            "Q": 128,
            "K": 64,
            "MASK": 127,
            "PRECISION": "ieee",
            "UPCAST": False,
        }
        result = compiled(kernels.nearest_newer, warps, **constants)
        report(f"nearest_newer, {width}", result, "wgmma.*bf16")
    for rows, found in ((False, True), (True, True), (True, False), (False, False)):
        constants = {
            "F": 256,
            "WIDTH": 256,
            "BLOCK": 16,
            "WEIGHTING": "root_ward",
            "ROWS": rows,
            "FOUND": found,
        }
        result = compiled(kernels.cheaper_partner, 4, **constants)
        report(f"cheaper_partner, rows={rows}, found={found}", result, "ld.global")
    for gone in (False, True):
        report(f"lowest, gone={gone}", compiled(merge_kernels.lowest, 16, BLOCK=4096, GONE=gone), "ld.global")
    report("places", compiled(merge_kernels.places, 16, BLOCK=4096, WANTED=1), "ld.global")
    report("find_roots", compiled(merge_kernels.find_roots, 4, BLOCK=256), "ld.global")
    for first, width in ((0, 64), (0, 128), (0, 256), (128, 256)):
        columns = width - first
        sizes = {
            "FIRST": first,
            "F": width,
            "WIDTH": columns,
            "BLOCK": 64,
            "PRECISION": "tf32",
            "UPCAST": False,
        }
        warps = 4 if columns <= 128 else 8
        result = compiled(merge_kernels.fold, warps, TOTAL=False, **sizes)
        report(f"fold, {first} to {width}", result, "tf32")
    sizes = {"FIRST": 0, "F": 1, "WIDTH": 16, "BLOCK": 64, "PRECISION": "ieee", "UPCAST": False}
    report("fold, counts", compiled(merge_kernels.fold, 4, x="*fp32", TOTAL=True, **sizes), "ld.global")
    result = compiled(merge_kernels.fill, 4, numbers=("first",), F=128, WIDTH=128, BLOCK=64)
    report("fill", result, r"st.global.*v4")
    result = compiled(merge_kernels.fill, 4, numbers=("first",), x="*i32", F=1, WIDTH=1, BLOCK=1024)
    report("fill, numbers", result, "st.global")


if __name__ == "__main__":
    main()
