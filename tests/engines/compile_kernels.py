"""Compiles the kernels of fastar.engines for an H100 (sm_90), with the tiles used there; prints what each takes.

Run as a program: `python -m tests.engines.compile_kernels`. Fails as tests/ann/compile_kernels.py does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastar.engines.kernels import attend_packed, join_parts, move_rows
from fastar.engines.packed import TILES
from tests.ann.compile_kernels import report

POINTERS = {
    "q": "bf16", "k": "bf16", "v": "bf16", "out": "bf16", "lse": "fp32", "log_count": "fp32",
    "key_codes": "u8", "key_low": "fp16", "key_step": "fp16",
    "first_row": "i64", "lengths": "i32",
    "value_codes": "u8", "value_low": "fp16", "value_step": "fp16",
    "parts": "bf16", "part_lse": "fp32",
    "source": "bf16", "order": "i64", "target": "bf16", "mask": "u8", "counts": "i32", "indices": "i32",
}  # fmt: skip
ALIGNED = ("_batch", "_head", "_row")  # strides, and pointers: multiples of 16, as the launcher finds them


def compiled(kernel, constants: dict[str, object], **options: int):  # type: ignore[no-untyped-def]
    """The kernel for tensors of Wan's geometry."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else "fp32" if name == "scale" else "i32"
        if name in POINTERS:
            signature[name] = "*" + POINTERS[name]
        if name in POINTERS or name.endswith(ALIGNED):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", 90, 32), options)


def main() -> None:
    """All kernels, in the forms in which the engines launch them."""
    for bits, biased, group, ragged in ((8, True, 128, False), (4, True, 128, True), (8, False, 64, False)):
        tile = TILES[bits]
        constants = {
            "D": 128, "KEY_GROUP": group, "KEY_BITS": bits, "VALUE_GROUP": group, "VALUE_BITS": bits,
            "Q": tile.queries, "K": tile.keys, "BIASED": biased, "RAGGED": ragged, "UPCAST": False,
        }  # fmt: skip
        result = compiled(attend_packed, constants, num_warps=tile.warps, num_stages=tile.stages)
        report(
            f"attend_packed int{bits}, {'with' if biased else 'without'} log-counts", result, "wgmma.*bf16"
        )
    for scatter in (False, True):
        constants = {"D": 144, "ROWS": 32, "WIDTH": 256, "SCATTER": scatter}
        report(f"move_rows, scatter {scatter}", compiled(move_rows, constants), r"st.global.*v4")
    constants = {"D": 128, "WIDTH": 128, "ROWS": 16}
    report("join_parts", compiled(join_parts, constants), r"ld.global.*v4")


if __name__ == "__main__":
    main()
