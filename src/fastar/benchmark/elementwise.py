"""The kernels of a fused Wan pass one by one: time, and bytes moved a second, which memory alone should bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastar.attention.place import Placement
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.launch import quantise, residual_norm, rms_norm_
from fastar.backbones.wan.linears import Linear, Linears
from fastar.benchmark.timing import timed


@dataclass(frozen=True)
class Kernel:
    """One of a pass: how often it is called there, and the bytes that one call must read and write (0: unknown)."""

    what: str
    calls: int
    bytes: float
    run: Callable[[], object]


def timed_kernels(
    kernels: Iterable[Kernel], *, device: torch.device, repeats: int = 7
) -> Iterator[dict[str, Any]]:
    """Rows what, calls, ms (of one), ms_pass (of all), gb_per_s.

    Inputs come from memory, where in a pass a kernel finds some of its own in the L2 cache.
    """
    for kernel in kernels:
        ms = 1e3 * timed(kernel.run, device=device, repeats=repeats, captured=None).median
        yield {
            "what": kernel.what,
            "calls": kernel.calls,
            "ms": ms,
            "ms_pass": kernel.calls * ms,
            "gb_per_s": kernel.bytes / ms / 1e6 if kernel.bytes else None,
        }


def kernels_of(
    config: WanConfig,
    *,
    frames: int,
    grid: tuple[int, int],
    key_width: int,
    linears: Linears,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Kernel]:
    """The elementwise kernels of a fused pass over `frames` latent frames of `grid` tokens, keys `key_width` wide.

    Those that quantise are among them if `linears` are fp8. Two are the first product of the feed-forward, without its
    GELU and with it: what that costs.
    """
    tokens, dim, layers = frames * grid[0] * grid[1], config.dim, config.num_layers
    reads = config.text_dim is not None or config.image_dim is not None

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    stream = tokens * dim * dtype.itemsize
    x, update, modulation = draw(tokens, dim), draw(tokens, dim), draw(1, frames, 6, dim)
    shift, scale, gate = modulation.unbind(2)[:3]
    yield Kernel(
        "residual and norm",
        (2 + reads) * layers,
        4 * stream,
        lambda: residual_norm(x, update, gate, shift, scale, eps=config.eps),
    )
    qkv, weights = draw(tokens, 3 * dim), draw(2, dim)
    yield Kernel("norm of q and k", layers, 4 * stream, lambda: rms_norm_(qkv, weights, eps=config.eps))
    if reads:
        one = weights[:1]
        yield Kernel("norm of cross q", layers, 2 * stream, lambda: rms_norm_(update, one, eps=config.eps))
    heads, width = config.num_heads, config.head_dim
    q, k, v = (part.transpose(1, 2) for part in qkv.view(1, tokens, 3, heads, width).unbind(2))
    turns = RotaryEmbedding(width, config.rope_theta).tables(grid_positions(0, frames, grid, device))
    q_out, k_out = (draw(1, heads, tokens, key_width) for _ in range(2))
    placement = Placement(q, k, v, turns, q_out, k_out, torch.empty_like(v))
    moved = (4 + 2 * key_width / width) * stream
    yield Kernel(f"place, {key_width} wide", layers, moved, placement.run)
    if linears == Linears.FP8:
        hidden, moved = draw(tokens, config.ffn_dim), tokens * (1 + dtype.itemsize)
        yield Kernel("8 bits of o's input", (1 + reads) * layers, moved * dim, lambda: quantise(x))
        yield Kernel("GELU and 8 bits", layers, moved * config.ffn_dim, lambda: quantise(hidden, gelu=True))
    up = Linear(draw(config.ffn_dim, dim) / dim**0.5, draw(config.ffn_dim))
    yield Kernel("feed-forward up", layers, 0, lambda: up(x))
    yield Kernel("feed-forward up, with GELU", layers, 0, lambda: up.hidden(x))
