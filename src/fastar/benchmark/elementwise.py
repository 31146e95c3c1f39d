"""The kernels of a fused Wan pass one by one: time, and bytes moved a second, which memory alone should bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastar.attention.place import place
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.launch import quantise, residual_norm, rms_norm_
from fastar.backbones.wan.linears import Linear
from fastar.benchmark.timing import timed


@dataclass(frozen=True)
class _Kernel:
    what: str
    calls: int  # a pass
    numbers: float  # read and written, in rows of the residual stream
    run: Callable[[], object]


def benchmark_elementwise(
    config: WanConfig,
    *,
    frames: int,
    grid: tuple[int, int],
    key_width: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 7,
) -> Iterator[dict[str, Any]]:
    """Rows what, calls (a pass), ms (of one), ms_pass (of all), gb_per_s; of a chunk of `frames` frames, `grid` tokens.

    Inputs come from memory, where in a pass a kernel finds some of its own in the L2 cache. Keys are placed `key_width`
    numbers wide. Two rows are of the first product of the feed-forward, with the GELU in it and without; they tell what
    that costs and have no gb_per_s. 8-bit rows are part of a pass with 8-bit linears only.
    """
    for kernel in _kernels(config, frames, grid, key_width, device, dtype):
        ms = 1e3 * timed(kernel.run, device=device, repeats=repeats).median
        moved = kernel.numbers * frames * grid[0] * grid[1] * config.dim * dtype.itemsize
        yield {
            "what": kernel.what,
            "calls": kernel.calls,
            "ms": ms,
            "ms_pass": kernel.calls * ms,
            "gb_per_s": moved / ms / 1e6 if moved else None,
        }


def _kernels(
    config: WanConfig,
    frames: int,
    grid: tuple[int, int],
    key_width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[_Kernel]:
    tokens, dim, layers = frames * grid[0] * grid[1], config.dim, config.num_layers
    reads = config.text_dim is not None or config.image_dim is not None

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, update, modulation = draw(tokens, dim), draw(tokens, dim), draw(1, frames, 6, dim)
    shift, scale, gate = modulation.unbind(2)[:3]
    norms = 2 + reads
    yield _Kernel(
        "residual and norm",
        norms * layers,
        4,
        lambda: residual_norm(x, update, gate, shift, scale, eps=config.eps),
    )
    qkv, weights = draw(tokens, 3 * dim), draw(2, dim)
    yield _Kernel("norm of q and k", layers, 4, lambda: rms_norm_(qkv, weights, eps=config.eps))
    if reads:
        yield _Kernel("norm of cross q", layers, 2, lambda: rms_norm_(update, weights[:1], eps=config.eps))
    heads, width = config.num_heads, config.head_dim
    q, k, v = (part.transpose(1, 2) for part in qkv.view(1, tokens, 3, heads, width).unbind(2))
    turns = RotaryEmbedding(width, config.rope_theta).tables(grid_positions(0, frames, grid, device))
    outs = [
        torch.empty(1, heads, tokens, wide, dtype=dtype, device=device)
        for wide in (key_width, key_width, width)
    ]
    numbers = 4 + 2 * key_width / width
    yield _Kernel(
        f"place, {key_width} wide", layers, numbers, lambda: place(q, k, v, turns, outs[0], outs[1], outs[2])
    )
    hidden, eighth = draw(tokens, config.ffn_dim), 1 + 1 / dtype.itemsize
    yield _Kernel("8 bits of o's input", layers * (1 + reads), eighth, lambda: quantise(x))
    yield _Kernel(
        "GELU and 8 bits", layers, eighth * config.ffn_dim / dim, lambda: quantise(hidden, gelu=True)
    )
    up = Linear(draw(config.ffn_dim, dim) / dim**0.5, draw(config.ffn_dim))
    yield _Kernel("feed-forward up", layers, 0, lambda: up(x))
    yield _Kernel("feed-forward up, with GELU", layers, 0, lambda: up.hidden(x))
