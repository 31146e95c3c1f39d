"""Compiles the kernels of fastar.sparsity for an H100 (sm_90), as `fastar.sparsity.fused` launches them.

Run as a program: `python -m tests.sparsity.compile_kernels`. Fails as `tests.hopper.report` says.
"""

from fastar.sparsity import kernels
from fastar.sparsity.fused import BLOCKS, OTHERS, ROWS, columns_for
from tests import hopper
from tests.hopper import report


def main() -> None:
    """All, in Wan's geometry."""
    types = {"starts": "*i32", "ends": "*i32", "wildcards": "*i32", "out": "*i32"}
    constants = {"Q": 128, "K": 128, "ROWS": ROWS, "BLOCKS": BLOCKS, "WILDCARDS": True}
    report("shared_pairs", hopper.compiled(kernels.shared_pairs, types, constants), "ld.global")
    types = {"x": "*bf16", "order": "*i64", "live": "*i64", "out": "*fp32"}
    for width in (128, 1):
        constants = {"D": width, "WIDTH": width, "SIZE": 128, "ROWS": ROWS}
        strides = ("x_batch", "x_head", "x_row") if width > 1 else ()
        result = hopper.compiled(kernels.block_means, types, constants, strides)
        report(f"block_means, {width} wide", result, "ld.global")
    types = {
        "scores": "*fp32", "live": "*i64", "quotas": "*i32", "mask": "*u8", "counts": "*i32", "indices": "*i32",
    }  # fmt: skip
    for blocks in (256, 1024):  # 32,760 and 131,040 keys
        constants = {"K": 128, "BLOCKS": columns_for(blocks), "OTHERS": OTHERS}
        report(
            f"choose_blocks of {blocks}",
            hopper.compiled(kernels.choose_blocks, types, constants),
            "st.global",
        )


if __name__ == "__main__":
    main()
