"""Compiles the kernels of a fused Wan pass for an H100 (sm_90), at the sizes of Wan2.1-1.3B; prints what each takes.

Run as a program: `python -m tests.backbones.compile_wan_kernels`. Fails as `tests.hopper.report` says; what is wanted
is memory read and written 16 bytes at a time.
"""

from typing import Any

from fastar.attention import kernels as attention
from fastar.attention.place import tile
from fastar.backbones.wan import kernels
from fastar.backbones.wan.launch import row_tile
from tests.hopper import compiled, report

DIM, FFN, HEAD = 1536, 8960, 128
POINTERS = (
    "x",
    "update",
    "gate",
    "shift",
    "scale",
    "normed",
    "weight",
    "out",
    "q",
    "k",
    "v",
    "q_out",
    "k_out",
    "v_out",
)
TYPES = dict.fromkeys(POINTERS, "*bf16") | {
    "row_scale": "*fp32",
    "cos": "*fp32",
    "sin": "*fp32",
    "eps": "fp32",
}
STRIDES = [name for name in attention.place.arg_names if name.endswith(("_batch", "_head", "_row"))]
WIDE = r"(?s)ld\.global\S*v4\.b32.*st\.global\S*v4\.b32"
EIGHT_BITS = r"(?s)ld\.global\S*v4\.b32.*cvt\S*e4m3x2"


def check(name: str, kernel: Any, wanted: str, types: dict[str, str], **constants: Any) -> None:
    """Compile and report."""
    warps = constants.pop("num_warps", 4)
    report(name, compiled(kernel, TYPES | types, constants, STRIDES, num_warps=warps), wanted)


def main() -> None:
    """All kernels, in the forms in which a pass launches them."""
    strides = {"GATE_STRIDE": 6 * DIM, "NORM_STRIDE": 6 * DIM}
    for name, add, gated, modulated in (
        ("first norm", False, False, True),
        ("gated, modulated", True, True, True),
        ("gated, own weights", True, True, False),
        ("added, modulated", True, False, True),
    ):
        flags = {"ADD": add, "GATED": gated, "MODULATED": modulated}
        for eight_bits in (False, True):
            check(
                f"residual_norm, {name}{', 8 bits' * eight_bits}",
                kernels.residual_norm,
                EIGHT_BITS if eight_bits else WIDE,
                {"normed": "*fp8e4nv"} if eight_bits else {},
                QUANTISED=eight_bits, **flags, **strides, **row_tile(DIM),
            )  # fmt: skip
    check("rms_norm", kernels.rms_norm, WIDE, {}, STRIDE=3 * DIM, **row_tile(DIM))
    for gelu, width in ((False, DIM), (True, FFN)):
        check(
            f"quantise, {width}",
            kernels.quantise,
            EIGHT_BITS,
            {"out": "*fp8e4nv"},
            GELU=gelu,
            **row_tile(width),
        )
    columns = {"q_column": 1, "k_column": 1, "v_column": 1}  # as Triton specialises strides of 1
    for width, ordered in ((HEAD, False), (HEAD + 16, False), (HEAD + 16, True)):
        columns["ORDERED"] = ordered
        name = f"place, {width}{', in order' * ordered}"
        check(name, attention.place, WIDE, {"order": "*i64"}, **columns, **tile(HEAD, width, width))


if __name__ == "__main__":
    main()
