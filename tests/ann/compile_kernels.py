"""Compiles every kernel of fastar.ann for an H100 (sm_90), with the tiles used there; prints what each takes.

Run as a program: `python tests/ann/compile_kernels.py`. Fails if a kernel does not compile, takes more shared memory
than a block may have, spills registers, or does without the instructions it was written for.
"""

import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastar.ann import kernels
from fastar.ann.launch import BUCKET_TILES, CODE_TILE, TILES, WIDE_TILE, Tile

SHARED = 227 * 1024  # bytes of shared memory a block may have on sm_90
POINTERS = {
    "q": None, "k": None, "x": None, "offset": "fp32", "scale": "fp32", "excluded": "i32", "valid": "u8",
    "best_score": "fp32", "best_index": "i32", "query_order": "i32", "query_code": "i32", "key_order": "i32",
    "key_code": "i32", "flips": "i32", "scores": "fp32", "indices": "i32", "score": "fp32", "index": "i64",
    "out": "fp32",
}  # fmt: skip


def compiled(kernel, dtype: str, tile: Tile, **constants):  # type: ignore[no-untyped-def]
    """The kernel with features of `dtype` and tiles of `tile`; other arguments are pointers as above, or int32."""
    constants |= {"Q": tile.queries, "K": tile.keys, "WIDTH": tile.width}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constants else "i32"
        if name in POINTERS:
            kind = "*" + (POINTERS[name] or dtype)
        signature[name] = kind
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, GPUTarget("cuda", 90, 32), options)


def report(name: str, result, wanted: str) -> None:  # type: ignore[no-untyped-def]
    """One line, after checks."""
    assert result.metadata.shared <= SHARED, (name, result.metadata.shared)
    assert re.search(wanted, result.asm["ptx"]), f"{name}: no {wanted} in its code"
    spilled = spilled_bytes(result.asm["ptx"])
    assert spilled <= 256, f"{name}: {spilled} bytes of registers spilled"
    print(f"{name}: {result.metadata.shared} bytes of shared memory, {spilled} spilled")  # noqa: T201


def spilled_bytes(ptx: str) -> int:
    """Bytes of registers that the assembler stores to memory for want of room."""
    assembler = str(triton.knobs.nvidia.ptxas.path)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


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
    report("merge_partials", compiled(kernels.merge_partials, "fp32", TILES[4], BLOCK=256), "ld.global")


if __name__ == "__main__":
    main()
