"""What a block plan costs on a GPU beside attention: its tokens put in order and back, with one kernel each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastar.engines.plan import inverse_order, take_rows

_ROWS = 32  # tokens a program moves


def gathered(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, L, D] with its tokens in `order` [B, H, L], in new memory; x itself if that is None."""
    if order is None:
        return x
    target = x.new_empty(x.shape)
    _move(x, order, target, scatter=False)
    return target


def gather_into(target: Tensor, x: Tensor, order: Tensor) -> None:
    """Write x [B, H, L, D] with its tokens in `order` [B, H, L] to `target`, on any device."""
    if x.device.type == "cuda":
        _move(x, order, target, scatter=False)
    else:
        target.copy_(take_rows(x, order))


def scattered(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `gathered`, in new memory laid out as [B, L, H, D]; x itself if order is None."""
    if order is None:
        return x
    batch, heads, length, width = x.shape
    target = x.new_empty(batch, length, heads, width).transpose(1, 2)
    _move(x, order, target, scatter=True)
    return target


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x [B, H, L, D] that lie in `order` [B, H, L] where they were before, in new memory, on any device."""
    return scattered(x, order) if x.device.type == "cuda" else take_rows(x, inverse_order(order))


def _move(source: Tensor, order: Tensor, target: Tensor, *, scatter: bool) -> None:
    assert source.stride(-1) == 1 and source.shape == target.shape and order.shape == source.shape[:3]
    batch, heads, length, width = source.shape
    _kernels().move_rows[(-(-length // _ROWS), batch * heads)](
        source, order.contiguous(), target, length, heads, *source.stride()[:3], *target.stride()[:3],
        D=width, ROWS=_ROWS, WIDTH=_power_of_two(width), SCATTER=scatter,
    )  # fmt: skip


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def _kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.engines import kernels

    return kernels
