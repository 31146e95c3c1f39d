"""A pass through a Wan transformer's blocks in few kernels: its parameters, the eager pass's results up to rounding.

Eager, a block makes some 25 trips over the residual stream beside its products. Here every residual is added by the
kernel that takes the next norm, queries and keys are normalised where one product left them beside the values, the
feed-forward's GELU is in its product, and the modulation of all layers is made at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastar.attention.context import Attend, Stream
from fastar.backbones.wan.launch import check_device, residual_norm, rms_norm_
from fastar.backbones.wan.layers import Contexts, KeysValues, WanBlock, run_in
from fastar.backbones.wan.linears import Fp8Linear, Linear, Linears, Rows, check_fp8, linears_named
from fastar.backbones.wan.transformer import CausalWanTransformer


def fuse(transformer: CausalWanTransformer, linears: Linears | str = Linears.MODEL) -> CausalWanTransformer:
    """Run the transformer's passes fused from now on; `transformer.fused = None` makes them eager again.

    The weights of q, k and v become views of one tensor, as do some smaller ones: they can be loaded and changed in
    place, but after a move to another device or dtype, call this again; so, too, with `linears=fp8`, after any change.
    Fused passes have no gradients.

    Raises:
        ValueError: the transformer has an action module, Triton cannot run where it is, or the device cannot multiply
            as `linears` says.
    """
    linears = linears_named(linears)
    if transformer.config.action_module is not None:
        raise ValueError("fused execution knows no action module: leave this transformer eager")
    check_device(transformer.patch_embedding.weight.device)
    if linears == Linears.FP8:
        check_fp8(transformer)
    with torch.inference_mode(False), torch.no_grad():
        transformer.fused = FusedPass(transformer, Fp8Linear if linears == Linears.FP8 else Linear)
    return transformer


@dataclass(frozen=True)
class Execution:
    """How a transformer's passes are run: eager, the default, or fused, with its big linears in `linears`."""

    fused: bool = False
    linears: Linears = Linears.MODEL

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", linears_named(self.linears))  # configs hold strings
        if self.linears != Linears.MODEL and not self.fused:
            raise ValueError(
                f"linears={self.linears} needs fused=true: an eager pass multiplies in the model's dtype"
            )

    def __str__(self) -> str:
        return f"fused, linears={self.linears}" if self.fused else "eager"

    def apply(self, transformer: CausalWanTransformer) -> None:
        """Run its passes so from now on; raises what `fuse` does."""
        if self.fused:
            fuse(transformer, self.linears)
        else:
            transformer.fused = None


class FusedPass:
    """From embedded tokens to patches of velocity."""

    def __init__(self, transformer: CausalWanTransformer, linear: type[Linear]) -> None:
        blocks = cast(Sequence[WanBlock], transformer.blocks)
        self.numerics, self.head = transformer.config.numerics, transformer.head
        self.first = blocks[0]
        self.modulation = _packed([block.modulation for block in blocks])  # [layers, 6, dim]
        self.blocks = [_Block(block, linear) for block in blocks]

    def __call__(
        self,
        tokens: Tensor,
        e: Tensor,
        projected: Tensor,
        contexts: Mapping[Stream, Tensor | tuple[KeysValues, ...] | None],
        attend: Attend,
        rays: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, L, dim], e [B, F, dim], projected e [B, F, 6, dim] -> [B, L, patch * patch * out_channels].

        `rays` [B, L, num_rays] are of the tokens, for a transformer with an odometer.

        Raises:
            ValueError: gradients or autocast are on, or the transformer was moved since it was fused.
        """
        self._check(tokens)
        batch, length = tokens.shape[:2]
        exact = torch.float32 if self.numerics != "self_forcing" else tokens.dtype  # of the modulation
        stream = tokens.flatten(0, 1).to(torch.float32 if self.numerics == "wan" else tokens.dtype)
        modulation = self.modulation[:, None, None].to(exact) + projected.to(exact)  # [layers, B, F, 6, dim]
        read = {name: context for name, context in contexts.items() if context is not None}
        update, gate = None, None
        for layer, block in enumerate(self.blocks):
            own = {name: c[layer] if isinstance(c, tuple) else c for name, c in read.items()}
            update, gate = block(stream, update, gate, modulation[layer], own, attend, batch, rays)
        shift, scale = (self.head.modulation + e.to(exact).unsqueeze(2)).unbind(2)
        dtype = stream.dtype if self.numerics == "wan" else tokens.dtype
        h = residual_norm(stream, update, gate, shift, scale, eps=self.head.norm.eps, dtype=dtype)
        assert isinstance(h, Tensor)
        return run_in(dtype, self.head.head, h).unflatten(0, (batch, length))

    def _check(self, tokens: Tensor) -> None:
        if torch.is_grad_enabled():
            raise ValueError(
                "fused execution has no gradients: call it under torch.inference_mode() or torch.no_grad(), or set "
                "transformer.fused = None"
            )
        if torch.is_autocast_enabled(tokens.device.type):
            raise ValueError(
                "fused execution knows no autocast: store the transformer in the dtype it is to run in"
            )
        if self.modulation.data_ptr() != self.first.modulation.data_ptr():
            raise ValueError("the transformer was moved after it was fused: call fuse(transformer) again")


class _Block:
    """One layer's parameters, packed."""

    def __init__(self, block: WanBlock, linear: type[Linear]) -> None:
        self.block, own = block, block.self_attn
        self.rows_dtype = linear.rows_dtype
        three = (own.q, own.k, own.v)
        self.qkv = linear(_packed([p.weight for p in three]), _packed([p.bias for p in three]))
        self.norms = _packed([own.norm_q.weight, own.norm_k.weight]).unflatten(0, (2, -1))
        if own.num_rays:
            self.rays = _packed([own.ray_q.weight, own.ray_k.weight])
        self.out = linear(own.o.weight, own.o.bias)
        if hasattr(block, "cross_attn"):
            cross = block.cross_attn
            self.cross_q = linear(cross.q.weight, cross.q.bias)
            self.cross_norm = cross.norm_q.weight.detach().unsqueeze(0)
            self.cross_out = linear(cross.o.weight, cross.o.bias)
        up, down = (cast(nn.Linear, block.ffn[at]) for at in (0, 2))
        self.up, self.down = linear(up.weight, up.bias), linear(down.weight, down.bias)

    def __call__(
        self,
        stream: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        modulation: Tensor,
        contexts: Contexts,
        attend: Attend,
        batch: int,
        rays: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The feed-forward's update [rows, dim] and its gate [B, F, dim], which the next norm adds to the stream.

        To the stream [rows, dim] itself are added those of the layer before, given as `update` and `gate`, and this
        one's other updates. modulation [B, F, 6, dim].
        """
        block = self.block
        dtype = self.rows_dtype or block.self_attn.q.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)
        h = residual_norm(stream, update, gate, shift1, scale1, eps=block.norm1.eps, dtype=dtype)
        update, gate = self._attend(h, attend, batch, rays), gate1
        if contexts:
            norm = block.norm3
            h = residual_norm(stream, update, gate, norm.bias, norm.weight, eps=norm.eps, dtype=dtype)
            update, gate = self._read(h, contexts, attend, batch), None
        h = residual_norm(stream, update, gate, shift2, scale2, eps=block.norm2.eps, dtype=dtype)
        return self.down(self.up.hidden(h)), gate2

    def _attend(self, h: Rows, attend: Attend, batch: int, rays: Tensor | None) -> Tensor:
        """Self-attention of rows [rows, dim]: queries, keys and values stay in the memory of their one product."""
        qkv, own = self.qkv(h), self.block.self_attn
        rms_norm_(qkv, self.norms, eps=_eps(own.norm_q))
        if rays is not None:
            qkv[:, : len(self.rays)] += F.linear(rays, self.rays).flatten(0, 1)
        q, k, v = self._heads(qkv, batch)
        return self.out(_rows(attend("self", self.block.layer, q, k, v)))

    def _read(self, h: Rows, contexts: Contexts, attend: Attend, batch: int) -> Tensor:
        """What rows [rows, dim] read of each stream."""
        cross = self.block.cross_attn
        (q,) = self._heads(rms_norm_(self.cross_q(h), self.cross_norm, eps=_eps(cross.norm_q)), batch)
        read = []
        for stream, context in contexts.items():
            k, v = cross.project(stream, context) if isinstance(context, Tensor) else context
            read.append(_rows(attend(stream, self.block.layer, q, k, v)))
        return self.cross_out(sum(read[1:], start=read[0]))

    def _heads(self, x: Tensor, batch: int) -> Iterator[Tensor]:
        """Views [B, H, L, D] of each dim-wide part of x [rows, parts * dim]."""
        heads, dim = self.block.self_attn.num_heads, self.norms.shape[1]
        parts = x.unflatten(0, (batch, -1)).unflatten(-1, (-1, heads, dim // heads))  # B L parts H D
        return (part.transpose(1, 2) for part in parts.unbind(2))


def _rows(attended: Tensor) -> Tensor:
    """[B, H, L, D] -> [rows, dim]; free where memory is [B, L, H, D]."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None
    return norm.eps


def _packed(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all, along their first dimension, of which they become views."""
    packed = torch.cat([parameter.detach() for parameter in parameters])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, part in zip(parameters, packed.split(sizes), strict=True):
        parameter.data = part
    return packed
