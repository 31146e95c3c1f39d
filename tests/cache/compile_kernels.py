"""Compiles every kernel of fastar.cache for an H100 (sm_90), as `fastar.cache.fused` launches it; prints its needs.

Run as a program: `python tests/cache/compile_kernels.py`. Fails as tests/ann/compile_kernels.py does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastar.cache import kernels
from tests.ann.compile_kernels import report

FLOATS = {
    "cosine", "sine", "sums", "squares", "moment", "factor", "key_mean", "value_mean", "value_scale", "offset", "cost",
    "count", "total",
}  # fmt: skip
INDICES = {"rows", "partner", "found", "best", "root", "order", "target"}
FLAGS = {"gone", "chosen"}


def compiled(kernel, warps: int, numbers: dict[str, str], **constants):  # type: ignore[no-untyped-def]
    """The kernel with pointers to vectors as `numbers` says, others as above; what is left are whole numbers."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = numbers[name]
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in INDICES:
            signature[name] = "*i32"
        else:
            signature[name] = "*u8" if name in FLAGS else "i64" if name.endswith("stride") else "i32"
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})


def main() -> None:
    """All kernels, in bfloat16 at Wan's head of 128."""
    bf16, key = "*bf16", {"D": 128, "WIDTH": 128, "PRECISION": "tf32", "UPCAST": False}
    for rotate, full, wanted in ((True, True, "wgmma.*bf16"), (False, False, "ld.global")):
        numbers = {"x": bf16, "rows": "i32"}
        result = compiled(kernels.moments, 8, numbers, BLOCK=64, ROTATE=rotate, FULL=full, **key)
        report(f"moments, full={full}", result, wanted)
    report("cholesky", compiled(kernels.cholesky, 16, {}, D=128, WIDTH=128, SCALE=128**-0.5), "sqrt")
    vectors = dict.fromkeys(("key", "value", "projection", "out", "searched"), bf16)
    for project in (False, True):
        constants = {"BLOCK": 64, "PROJECT": project, "W": 64, **key}
        report(f"features, project={project}", compiled(kernels.features, 8, vectors, **constants), "tf32")
    for rows, found in ((False, True), (True, True), (True, False), (False, False)):
        constants = {
            "F": 256,
            "WIDTH": 256,
            "BLOCK": 16,
            "WEIGHTING": "root_ward",
            "ROWS": rows,
            "FOUND": found,
        }
        result = compiled(kernels.cheaper_partner, 4, {"x": bf16, "count_of_rows": "i32"}, **constants)
        report(f"cheaper_partner, rows={rows}, found={found}", result, "ld.global")
    for gone in (False, True):
        result = compiled(kernels.lowest, 16, {}, BLOCK=4096, GONE=gone)
        report(f"lowest, gone={gone}", result, "ld.global")
    report("places", compiled(kernels.places, 16, {"flags": "*u8"}, BLOCK=4096, WANTED=1), "ld.global")
    report("find_roots", compiled(kernels.find_roots, 4, {}, BLOCK=256), "ld.global")
    for first, width in ((0, 64), (0, 128), (0, 256), (128, 256)):
        runs = 1024 // (width - first)
        constants = {"FIRST": first, "F": width, "WIDTH": width - first, "RUNS": runs, "STEP": 4, "TOTAL": False}
        report(f"fold, {first} to {width}", compiled(kernels.fold, 4, {"x": bf16}, **constants), "ld.global")
    constants = {"FIRST": 0, "F": 1, "WIDTH": 16, "RUNS": 64, "STEP": 4, "TOTAL": True}
    report("fold, counts", compiled(kernels.fold, 4, {"x": "*fp32"}, **constants), "ld.global")
    constants = {"F": 128, "WIDTH": 64, "BLOCK": 128}
    result = compiled(kernels.compact, 4, {"x": bf16, "count": "i32", "keep": "*i32"}, **constants)
    report("compact", result, "bar.sync")


if __name__ == "__main__":
    main()
