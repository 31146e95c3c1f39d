"""The modulated blocks of a causal Wan transformer; shapes as in `fastar.backbones.wan.transformer`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastar.attention.context import Attend, Stream
from fastar.backbones.wan.actions import ActionModule
from fastar.backbones.wan.config import WanConfig

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, H, S, D] each."""

Contexts = Mapping[Stream, Tensor | KeysValues]
"""What cross-attention of one layer reads: by stream, embedded tokens [B, S, dim] or their keys and values."""


class WanAttention(nn.Module):
    """Projections of one attention; q and k are RMS-normalised over the full dim, before heads are split."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)

    def queries(self, x: Tensor) -> Tensor:
        """Of x [B, L, dim], heads not split: [B, L, dim] in the norm's dtype."""
        return _normed(self.q(x), self.norm_q)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values [B, H, S, D] of context [B, S, dim]."""
        v = self.v(context)
        return self.heads(_normed(self.k(context), self.norm_k).to(v.dtype)), self.heads(v)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, H, L, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """[B, H, L, D] -> [B, L, dim]."""
        return self.o(attended.transpose(1, 2).flatten(2))


class WanSelfAttention(WanAttention):
    """Attention of the tokens to each other, which `attend` rotates by their places.

    With `num_rays` features of each token's ray, q and k also hold a linear map of them: a query can then look for what
    was seen along its own ray, wherever in time that was. (Added to the tokens instead, rays were not learnt: their
    weights shrank tenfold in 3,000 steps.)
    """

    def __init__(self, config: WanConfig, num_rays: int = 0) -> None:
        super().__init__(config)
        self.num_rays = num_rays
        if num_rays:
            self.ray_q = nn.Linear(num_rays, config.dim, bias=False)
            self.ray_k = nn.Linear(num_rays, config.dim, bias=False)

    def forward(self, x: Tensor, layer: int, attend: Attend, rays: Tensor | None = None) -> Tensor:
        """x [B, L, dim] -> [B, L, dim]; `rays` [B, L, num_rays] are of its tokens."""
        k, v = self.keys_values(x)
        q = self.heads(self.queries(x).to(v.dtype))
        if rays is not None:
            q = q + self.heads(self.ray_q(rays)).to(q.dtype)
            k = k + self.heads(self.ray_k(rays)).to(k.dtype)
        return self.output(attend("self", layer, q, k, v))


class WanCrossAttention(WanAttention):
    """Attention to a prompt, to an image, or to both with the same queries; the results are added before `o`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.image_apart = config.text_dim is not None and config.image_dim is not None
        if self.image_apart:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = nn.RMSNorm(config.dim, eps=config.eps)

    def forward(self, x: Tensor, contexts: Contexts, layer: int, attend: Attend) -> Tensor:
        """What x [B, L, dim] reads of each stream in `contexts`, [B, L, dim]."""
        q, read = self.heads(self.queries(x)), []
        for stream, context in contexts.items():
            k, v = self.project(stream, context) if isinstance(context, Tensor) else context
            read.append(attend(stream, layer, q.to(v.dtype), k, v))
        return self.output(sum(read[1:], start=read[0]))

    def project(self, stream: Stream, context: Tensor) -> KeysValues:
        """Keys and values of a stream's embedded tokens [B, S, dim]."""
        if stream != "image" or not self.image_apart:
            return self.keys_values(context)
        v = self.v_img(context)
        return self.heads(_normed(self.k_img(context), self.norm_k_img).to(v.dtype)), self.heads(v)


class ImageEmbedding(nn.Module):
    """Tokens of an image encoder (CLIP) in the transformer's width, in Wan's layout."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S, image_dim] -> [B, S, dim]."""
        return self.proj(tokens)


class WanBlock(nn.Module):
    """Self-attention, optional cross-attention and action module, and feed-forward, modulated frame by frame."""

    def __init__(self, config: WanConfig, layer: int, num_rays: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.numerics = config.numerics
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(config, num_rays)
        if config.text_dim is not None or config.image_dim is not None:
            self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
            self.cross_attn = WanCrossAttention(config)
        self.action_model: ActionModule | None = None
        if config.action_module is not None and layer < config.action_module.layers:
            self.action_model = ActionModule(config.action_module, config.dim)
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
        contexts: Contexts,
        attend: Attend,
        rays: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, dim] frame-major; e [B, F, 6, dim] per-frame modulation; rays of x; actions told to its frames."""
        model_dtype = self.self_attn.q.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation + e.to(_modulation_dtype(self, x))
        ).unbind(2)

        h = _modulate(self.norm1, x, shift1, scale1).to(model_dtype)
        x = self._add(x, self.self_attn(h, self.layer, attend, rays), gate1)
        if contexts:
            h = _norm(self.norm3, x, shift1.dtype).to(model_dtype)
            x = x + self.cross_attn(h, contexts, self.layer, attend)
        if self.action_model is not None and told is not None:
            x = self.action_model(x, told, self.layer, attend)
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
        h = _modulate(self.norm, x, shift, scale)
        return run_in(h.dtype if self.numerics == "wan" else self.head.weight.dtype, self.head, h)


def run_in(dtype: torch.dtype, layers: nn.Linear | nn.Sequential, x: Tensor) -> Tensor:
    """`layers` on x with both in `dtype`, whatever the weights are stored in."""
    x = x.to(dtype)
    for layer in layers if isinstance(layers, nn.Sequential) else [layers]:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
        else:
            x = layer(x)
    return x


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In the dtype of the norm's weight: float32 under autocast, while attention gets that of the projections."""
    return norm(x.to(norm.weight.dtype))


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
