"""How the kernels of `fastar.backbones.wan.kernels` are launched, on rows [rows, D] of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastar.interpreter import interpreted

EIGHT_BITS = torch.float8_e4m3fn
_NUMBERS_A_WARP = 512  # of a row; 16 a thread


@dataclass(frozen=True)
class Quantised:
    """Rows in 8 bits: e4m3 `values` [rows, D], to be multiplied by float32 `scales` [rows, 1]."""

    values: Tensor
    scales: Tensor


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor | Quantised:
    """x + gate * update, left in x, and the LayerNorm of that * (1 + scale) + shift: one kernel.

    x [rows, D], contiguous, is written in place; `update` [rows, D] None: nothing is added. `gate` [B, F, D] (None: 1),
    `shift` and `scale` [B, F, D] are of the rows' frames, views of one tensor [B, F, n, D] each; or shift and scale [D]
    are the norm's own bias and weight. Rows are frame-major, the B * F frames equally long. The result is in `dtype`
    (None: x's); in float8_e4m3fn it is `Quantised`.
    """
    rows, width = x.shape
    modulated = shift.dim() == 3
    frames = next((t.shape[0] * t.shape[1] for t in (gate, shift) if t is not None and t.dim() == 3), 1)
    quantised = dtype == EIGHT_BITS
    normed, scales = _eight_bits(x) if quantised else (torch.empty_like(x, dtype=dtype), x)
    _kernels().residual_norm[(rows,)](
        x,
        x if update is None else update.contiguous(),
        x if gate is None else gate,
        shift,
        scale,
        normed,
        scales,
        rows // frames,
        eps,
        GATE_STRIDE=0 if gate is None else gate.stride(1),
        NORM_STRIDE=shift.stride(1) if modulated else 0,
        ADD=update is not None,
        GATED=gate is not None,
        MODULATED=modulated,
        QUANTISED=quantised,
        **row_tile(width),
    )
    return Quantised(normed.to(EIGHT_BITS), scales) if quantised else normed


def rms_norm_(x: Tensor, weights: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of a row's leading parts, each alone, in place: x [rows, >= parts * D], weights [parts, D]."""
    parts, width = weights.shape
    _kernels().rms_norm[(x.shape[0], parts)](x, weights, eps, STRIDE=x.stride(0), **row_tile(width))
    return x


def quantise(x: Tensor, *, gelu: bool = False) -> Quantised:
    """Rows of x [rows, D], contiguous, in 8 bits; with `gelu`, of GELU(x) in its tanh form."""
    values, scales = _eight_bits(x)
    _kernels().quantise[(len(x),)](x, values, scales, GELU=gelu, **row_tile(x.shape[1]))
    return Quantised(values.to(EIGHT_BITS), scales)


def row_tile(width: int) -> dict[str, int]:
    """How a kernel that holds a row of `width` numbers in registers is compiled."""
    block = 1 << (width - 1).bit_length()
    return {"D": width, "BLOCK": block, "num_warps": min(16, max(1, block // _NUMBERS_A_WARP))}


def check_device(device: torch.device) -> None:
    """Raise a ValueError unless the kernels run on tensors of `device`."""
    if find_spec("triton") is None:
        raise ValueError("fused execution needs Triton: install triton, or leave the transformer eager")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"fused execution runs on a GPU, not on {device.type}: move the transformer there first, or leave it eager"
        )


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for rows like x's in 8 bits, and for their scales. Triton's interpreter rounds them wrongly: wider there."""
    dtype = EIGHT_BITS if x.device.type == "cuda" else torch.float32
    return torch.empty_like(x, dtype=dtype), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.backbones.wan import kernels

    return kernels
