"""Passes over an attention state without a backbone: random queries, keys and values, by seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.state import AttentionState
from fastar.cache import (
    CachePolicy,
    DenseCache,
    EmptyCache,
    RandomCache,
    TempCache,
    TempCachePaper,
    WindowCache,
)
from tests.small import CHUNK, DIM, HEADS, LAYERS, TOKENS, small_loop

POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "dense": lambda: DenseCache(storage="float32"),
    "window": lambda: WindowCache(budget_frames=6),
    "random": lambda: RandomCache(budget_frames=8),
    "tempcache": lambda: TempCache(budget_frames=8),
    "paper": lambda: TempCachePaper(threshold=0.3),
    "empty": EmptyCache,
}
LOOP = small_loop()


def qkv(seed: int, tokens: int = CHUNK * TOKENS) -> Tensor:
    """Raw q, k, v [3, 1, H, L, D]."""
    return torch.randn(3, 1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def forward(state: AttentionState, context: PassContext, seed: int, layers: int = LAYERS) -> list[Tensor]:
    """The attention calls of one pass over the first `layers` layers; the caller ends it."""
    state.begin_pass(context)
    return [state.attend("self", layer, *qkv(seed + layer)) for layer in range(layers)]


def commit(state: AttentionState, chunk: int, seed: int | None = None) -> list[Tensor]:
    outs = forward(state, LOOP.commit_pass(chunk * CHUNK), 100 * chunk if seed is None else seed)
    state.end_pass()
    return outs


def denoise(state: AttentionState, chunk: int, step: int = 3) -> list[Tensor]:
    outs = forward(state, list(LOOP.denoise_passes(chunk * CHUNK))[step], 7000 + step)
    state.end_pass()
    return outs
