"""Small attention worlds for cache tests: random tokens, and scenes that return."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastar import cache
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.cache import CachePolicy, CacheSpec, CacheView, Staged

BATCH, HEADS, DIM, GRID, LAYERS = 2, 2, 12, (2, 3), 2
TOKENS = GRID[0] * GRID[1]
ROPE = RotaryEmbedding(DIM)
FLOAT = {"storage": "float32"}

# every policy, with a budget to be added for those that take one
UNBOUNDED: dict[str, Callable[..., CachePolicy]] = {
    "dense": cache.DenseCache,
    "paper": lambda **o: cache.TempCachePaper(**{"threshold": 1.5, **o}),  # nothing is similar enough
}
BOUNDED: dict[str, Callable[..., CachePolicy]] = {
    "window": cache.WindowCache,
    "sink_recent": lambda **o: cache.WindowCache(sink_frames=1, **o),
    "random": cache.RandomCache,
    "random_uniform": lambda **o: cache.RandomCache(fading=False, **o),
    "key_norm": cache.KeyNormCache,
    "tempcache": cache.TempCache,
    "tempcache_last": lambda **o: cache.TempCache(key="last", match_space="raw", weighting="ward", **o),
    "tempcache_medoid": lambda **o: cache.TempCache(
        key="medoid", value="value_aware", moment="diagonal", **o
    ),
    "tempcache_regions": lambda **o: cache.TempCache(sink_frames=1, recent_frames=2, rounds=3, **o),
    "tempcache_shared": lambda **o: cache.TempCache(per_head=False, key="mean", match_space="raw", **o),
    "tempcache_cosine": lambda **o: cache.TempCache(
        similarity="cosine", weighting="older", log_count=False, **o
    ),
}


def spec(layers: int = LAYERS, device: str | torch.device = "cpu", **sizes: Any) -> CacheSpec:
    given = {"batch": BATCH, "num_heads": HEADS, "head_dim": DIM, "tokens_per_frame": TOKENS, **sizes}
    return CacheSpec(
        num_layers=layers, rope=ROPE, compute_dtype=torch.float32, device=torch.device(device), **given
    )


def bound(policy: CachePolicy, **sizes: Any) -> Any:
    policy.bind(spec(**sizes))
    return policy


def staged(q: Tensor, k: Tensor, v: Tensor, first_frame: int, grid: tuple[int, int] = GRID) -> Staged:
    frames = k.shape[2] // (grid[0] * grid[1])
    positions = grid_positions(first_frame, frames, grid, device=k.device)
    return Staged(q_raw=q, k_raw=k, k=ROPE.rotate(k, positions), v=v, positions=positions)


def random_chunk(seed: int, first_frame: int, frames: int = 2, device: str | torch.device = "cpu") -> Staged:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, BATCH, HEADS, frames * TOKENS, DIM, generator=generator).to(device)
    return staged(q, k, v, first_frame)


def commit(policy: CachePolicy, chunk: Staged) -> None:
    """Hand a chunk to the one layer of `policy`."""
    policy.stage(0, chunk)
    policy.commit(int(chunk.positions[0, 0]), chunk.k.shape[2] // TOKENS)


def fill(
    policy: CachePolicy, chunks: int, *, start: int = 0, first: int = 0, frames: int = 2
) -> list[Staged]:
    """Commit random chunks number `start` to `start + chunks - 1`; the first one of all is at frame `first`."""
    history = []
    for number in range(start, start + chunks):
        at = first + number * frames
        for layer in range(LAYERS):
            chunk = random_chunk(1000 * layer + number, at, frames)
            policy.stage(layer, chunk)
            history.append(chunk) if layer == 0 else None
        policy.commit(at, frames)
    return history


def attention(q: Tensor, view: CacheView) -> Tensor:
    """Plain softmax attention of roped q over a view."""
    logits = q.double() @ view.k.double().mT / math.sqrt(q.shape[-1])
    if view.log_count is not None:
        logits = logits + view.log_count.double()[:, :, None]
    return logits.softmax(-1) @ view.v.double()


def views_equal(a: CacheView, b: CacheView) -> bool:
    pairs = [(a.k, b.k), (a.v, b.v), (a.log_count, b.log_count), (a.positions, b.positions)]
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


def scene_chunks(count: int, places: int = 6, noise: float = 0.05, seed: int = 0) -> list[Staged]:
    """A camera that keeps returning to `places` fixed views, two frames at each: chunks for one layer."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(3, places, BATCH, HEADS, TOKENS, DIM, generator=generator)
    content[1] = torch.nn.functional.normalize(content[1], dim=-1) * math.sqrt(DIM)  # as after RMSNorm
    content[0] = content[1]  # queries look for their own content
    chunks = []
    for number in range(count):
        frames = content[:, number % places].repeat(1, 1, 1, 2, 1)
        q, k, v = frames + noise * torch.randn(frames.shape, generator=generator)
        chunks.append(staged(1.5 * q, k, v, 2 * number))
    return chunks
