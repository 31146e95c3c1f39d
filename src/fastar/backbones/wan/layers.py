"""The modulated blocks of a causal Wan transformer; shapes as in `fastar.backbones.wan.transformer`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastar.attention.context import Attend, Stream
from fastar.backbones.wan.config import WanConfig

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, H, S, D] each."""


class WanAttention(nn.Module):
    """Projections of one attention; q and k are RMS-normalised over the full dim, before heads are split.

    With `num_rays` features of each token's ray, q and k also hold a linear map of them: a query can then look for what
    was seen along its own ray, wherever in time that was. (Added to the tokens instead, rays were not learnt: their
    weights shrank tenfold in 3,000 steps.)
    """

    def __init__(self, config: WanConfig, num_rays: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_rays = config.num_heads, num_rays
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        if num_rays:
            self.ray_q = nn.Linear(num_rays, config.dim, bias=False)
            self.ray_k = nn.Linear(num_rays, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        stream: Stream,
        layer: int,
        attend: Attend,
        rays: Tensor | None = None,
    ) -> Tensor:
        """Queries from x [B, L, dim], keys and values from context [B, S, dim]; returns [B, L, dim].

        `context` may also be what `keys_values` made of it. `rays` [B, L, num_rays] are of the tokens of x, which are
        then those of the context too.
        """
        k, v = self.keys_values(context, rays) if isinstance(context, Tensor) else context
        # Under autocast the norms run in their weights' float32; attention gets the projections' dtype.
        q = self.norm_q(self.q(x).to(self.norm_q.weight.dtype)).to(v.dtype)
        if rays is not None:
            q = q + self.ray_q(rays).to(q.dtype)
        out = attend(stream, layer, self._heads(q), k, v)
        return self.o(out.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor, rays: Tensor | None = None) -> KeysValues:
        """Keys and values [B, H, S, D] of context [B, S, dim]."""
        v = self.v(context)
        k = self.norm_k(self.k(context).to(self.norm_k.weight.dtype)).to(v.dtype)
        if rays is not None:
            k = k + self.ray_k(rays).to(k.dtype)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class WanBlock(nn.Module):
    """Self-attention, optional text cross-attention and feed-forward, modulated frame by frame."""

    def __init__(self, config: WanConfig, layer: int, num_rays: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.numerics = config.numerics
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = WanAttention(config, num_rays)
        if config.text_dim is not None:
            self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
            self.cross_attn = WanAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        text: Tensor | KeysValues | None,
        attend: Attend,
        rays: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, dim] frame-major; e [B, F, 6, dim] per-frame modulation; text [B, S, dim] or None; rays of x.

        `text` may also be this layer's keys and values of it.
        """
        model_dtype = self.self_attn.q.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation + e.to(_modulation_dtype(self, x))
        ).unbind(2)

        h = _modulate(self.norm1, x, shift1, scale1).to(model_dtype)
        x = self._add(x, self.self_attn(h, h, "self", self.layer, attend, rays), gate1)
        if text is not None:
            h = _norm(self.norm3, x, shift1.dtype).to(model_dtype)
            x = x + self.cross_attn(h, text, "text", self.layer, attend)
        h = _modulate(self.norm2, x, shift2, scale2).to(model_dtype)
        return self._add(x, self.ffn(h), gate2)

    def _add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """x + gate * update, the gate [B, F, dim] being that of each token's frame."""
        total = x.to(gate.dtype) + (_by_frame(update, gate) * gate.unsqueeze(2)).flatten(1, 2)
        return total if self.numerics == "wan" else total.to(x.dtype)


class WanHead(nn.Module):
    """Modulated norm and projection of each token to its patch of velocity, channel fastest."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.numerics = config.numerics
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * config.patch**2)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, L, dim], e [B, F, dim] -> [B, L, patch * patch * out_channels]."""
        shift, scale = (self.modulation + e.to(_modulation_dtype(self, x)).unsqueeze(2)).unbind(2)
        return self.head(_modulate(self.norm, x, shift, scale).to(self.head.weight.dtype))


def _modulation_dtype(module: WanBlock | WanHead, x: Tensor) -> torch.dtype:
    return x.dtype if module.numerics == "self_forcing" else torch.float32


def _by_frame(x: Tensor, per_frame: Tensor) -> Tensor:
    """Tokens [B, L, dim] grouped by the frames of `per_frame` [B, F, dim]: [B, F, n, dim]."""
    return x.unflatten(1, (per_frame.shape[1], -1))


def _norm(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    weight = None if norm.weight is None else norm.weight.to(dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return F.layer_norm(x.to(dtype), norm.normalized_shape, weight, bias, norm.eps)


def _modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift of x [B, L, dim], with the [B, F, dim] of each token's frame."""
    normed = _by_frame(_norm(norm, x, shift.dtype), shift)
    return torch.addcmul(shift.unsqueeze(2), normed, 1 + scale.unsqueeze(2)).flatten(1, 2)
