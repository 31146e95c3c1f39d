"""The big linears of a fused pass: in the model's dtype, or in 8 bits with a scale a row and a scale an output."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fastar.backbones.wan.launch import EIGHT_BITS, Quantised, quantise
from fastar.backbones.wan.transformer import CausalWanTransformer

Rows = Tensor | Quantised
"""Tokens [rows, D]."""


class Linears(StrEnum):
    """Numbers that the big linears of the blocks (q, k, v, o, feed-forward) are multiplied in."""

    MODEL = "model"  # the model's own dtype
    FP8 = "fp8"  # e4m3, activations scaled by row and weights by output, sums in the model's dtype


class Linear:
    """Rows times a weight [N, D], plus a bias [N]."""

    rows_dtype: torch.dtype | None = None  # that it wants its rows in, if not the model's

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Rows) -> Tensor:
        """[rows, D] -> [rows, N]."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def hidden(self, x: Rows) -> Rows:
        """GELU (tanh) of the product, as the next linear wants it: the product itself never reaches memory."""
        assert isinstance(x, Tensor)
        if x.device.type == "cuda":  # in the product's epilogue
            return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)
        return F.gelu(self(x), approximate="tanh")  # there the above is the erf form


class Fp8Linear(Linear):
    """The same in 8 bits. Its weights are a copy: the bfloat16 ones stay for the eager pass."""

    rows_dtype = EIGHT_BITS

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight, bias)
        held = weight.detach().float()
        scales = held.abs().amax(1, keepdim=True).clamp_min(1e-12) / torch.finfo(EIGHT_BITS).max
        self.values = (held / scales).to(EIGHT_BITS)
        self.scales = scales.t().contiguous()

    def __call__(self, x: Rows) -> Tensor:
        x = quantise(x.contiguous()) if isinstance(x, Tensor) else x
        return torch._scaled_mm(
            x.values,
            self.values.t(),
            scale_a=x.scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,
        )

    def hidden(self, x: Rows) -> Rows:
        return quantise(self(x), gelu=True)


def check_fp8(transformer: CausalWanTransformer) -> None:
    """Raise a ValueError unless the big linears of a transformer can be multiplied in 8 bits where it is."""
    weight, config = transformer.patch_embedding.weight, transformer.config
    if (
        not multiplies_fp8(weight.device)
        or weight.dtype != torch.bfloat16
        or config.dim % 16
        or config.ffn_dim % 16
    ):
        raise ValueError(
            "linears=fp8 needs a bfloat16 model with widths divisible by 16, on a GPU of compute capability 8.9 or "
            f"newer (Ada, Hopper); this is {weight.dtype}, {config.dim} and {config.ffn_dim} wide, on "
            f"{weight.device.type}: use linears=model"
        )


def multiplies_fp8(device: torch.device) -> bool:
    """Whether it is a GPU with units for 8-bit floating-point products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def linears_named(name: Linears | str) -> Linears:
    """The member; ValueError if there is none of this name."""
    try:
        return Linears(name)
    except ValueError:
        raise ValueError(f"linears must be one of {', '.join(Linears)}, got {name!r}") from None
