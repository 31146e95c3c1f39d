"""Compiles the kernel of fastar.engines.packed for an H100 (sm_90), with the tile used there; prints what it takes.

Run as a program: `python -m tests.engines.compile_kernels`. Fails as tests/ann/compile_kernels.py does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastar.engines.packed import TILE
from fastar.engines.packed_kernels import attend_packed
from tests.ann.compile_kernels import report

POINTERS = {
    "q": "bf16", "k": "bf16", "v": "bf16", "out": "bf16", "lse": "fp32", "log_count": "fp32",
    "key_codes": "u8", "key_low": "fp16", "key_step": "fp16",
    "value_codes": "u8", "value_low": "fp16", "value_step": "fp16",
}  # fmt: skip
STRIDES = ("q_head", "q_row", "k_head", "k_row", "v_head", "v_row")


def main() -> None:
    for bits, biased in ((8, True), (4, True), (8, False)):
        constants = {
            "D": 128, "KEY_GROUP": 64, "KEY_BITS": bits, "VALUE_GROUP": 64, "VALUE_BITS": bits,
            "Q": TILE.queries, "K": TILE.keys, "BIASED": biased, "UPCAST": False,
        }  # fmt: skip
        signature, attributes = {}, {}
        for place, name in enumerate(attend_packed.arg_names):
            signature[name] = "constexpr" if name in constants else "fp32" if name == "scale" else "i32"
            if name in POINTERS:
                signature[name] = "*" + POINTERS[name]
            if name in POINTERS or name in STRIDES:  # as the launcher finds them
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(attend_packed, signature, constants, attributes)
        options = {"num_warps": TILE.warps, "num_stages": TILE.stages}
        result = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        report(
            f"attend_packed int{bits}, {'with' if biased else 'without'} log-counts", result, "wgmma.*bf16"
        )


if __name__ == "__main__":
    main()
