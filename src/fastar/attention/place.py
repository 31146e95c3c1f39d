"""Queries, keys and values of a pass, put where attention reads them: turned by their places, in one trip."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastar.attention.rope import apply_rotation
from fastar.engines.augmented import EXTRA

_ROWS = 16  # tokens of a head a program


def place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    """Write q and k [B, H, L, D] turned by `tables` into q_out and k_out, and v as it is into v_out.

    Inputs are views with any strides, `tables` a cosine and a sine [L, D/2] (`RotaryEmbedding.tables`). Outputs
    [B, H, L, W] are views, too, such as a stretch of the working keys, with numbers of a row side by side. Where W
    exceeds D, the rest is the augmented head's (`fastar.engines.augmented`): of a query two ones, then zeros; of a key
    zeros, a log-count of 0. W may differ between q_out and k_out; v_out has D. On a GPU it is one kernel, elsewhere
    plain PyTorch.

    Raises:
        ValueError: shapes do not fit, or an output's rows are not contiguous.
    """
    _check(q, k, v, tables, q_out, k_out, v_out)
    if q.device.type == "cuda":
        place_fused(q, k, v, tables, q_out, k_out, v_out)
    else:
        place_plainly(q, k, v, tables, q_out, k_out, v_out)


def place_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    """The definition of `place`."""
    width = q.shape[-1]
    q_out[..., :width] = apply_rotation(q, tables)
    k_out[..., :width] = apply_rotation(k, tables)
    v_out.copy_(v)
    q_out[..., width : width + EXTRA].fill_(1)
    q_out[..., width + EXTRA :].zero_()
    k_out[..., width:].zero_()


def place_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    """`place` by the kernel, on a GPU or in Triton's interpreter."""
    batch, heads, length, width = q.shape
    cos, sin = (table.contiguous() for table in tables)
    strides = [stride for x in (q, k, v) for stride in x.stride()]
    strides += [stride for x in (q_out, k_out, v_out) for stride in x.stride()[:3]]
    _kernels().place[(-(-length // _ROWS), batch * heads)](
        q, k, v, cos, sin, q_out, k_out, v_out, heads, length, *strides,
        **tile(width, q_out.shape[-1], k_out.shape[-1]),
    )  # fmt: skip


def tile(width: int, q_width: int, k_width: int) -> dict[str, int]:
    """What the kernel is compiled for: heads `width` wide, written that wide."""
    tails = (_power_of_two(wide - width) for wide in (q_width, k_width))
    sizes = {"D": width, "Q_WIDTH": q_width, "K_WIDTH": k_width, "BLOCK": _power_of_two(width), "ROWS": _ROWS}
    return sizes | dict(zip(("Q_TAIL", "K_TAIL"), tails, strict=True))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    shape, width = q.shape, q.shape[-1]
    if not shape == k.shape == v.shape == v_out.shape or any(
        table.shape != (shape[2], width // 2) for table in tables
    ):
        raise ValueError(
            f"place needs q, k, v and v_out of one shape [B, H, L, D] and tables [L, D/2], got {tuple(shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}, {tuple(v_out.shape)} and {[tuple(t.shape) for t in tables]}."
        )
    for name, out in (("q_out", q_out), ("k_out", k_out)):
        if out.shape[:3] != shape[:3] or 0 < out.shape[3] - width < EXTRA or out.shape[3] < width:
            raise ValueError(
                f"{name} must be {tuple(shape[:3])} and {width} or at least {width + EXTRA} wide, got "
                f"{tuple(out.shape)}."
            )
    if any(out.stride(-1) != 1 for out in (q_out, k_out, v_out)):
        raise ValueError("place writes rows side by side: the last stride of each output must be 1.")


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.attention import kernels

    return kernels
