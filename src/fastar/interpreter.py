"""Triton's interpreter, in which its kernels run on any machine, slowly: how tests without a GPU try them."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, as it does if TRITON_INTERPRET=1. Triton must be installed."""
    import triton

    return bool(triton.knobs.runtime.interpret)
