"""How the kernels of a TempCache commit are launched: what `fastar.cache.fused` and `fused_merge` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def or_unused(given: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel's argument that it does not read must still be a tensor."""
    return unused if given is None else given.contiguous()


def precision_of(slots: Tensor) -> str:
    """Of products with slots: float32 ones are for tests of exactness."""
    return "ieee" if slots.dtype == torch.float32 else "tf32"


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def padded(width: int) -> int:
    """A power of two that Triton can multiply with."""
    return max(16, 1 << (width - 1).bit_length())


def kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.cache import kernels as module

    return module


def merge_kernels() -> Any:
    """The module of those that merge."""
    from fastar.cache import merge_kernels as module

    return module
