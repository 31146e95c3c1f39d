"""What a commit of TempCache takes, step by step: features, match, merge, renew, edit, and all of it in a CUDA graph.

Contents are given, or stand-ins: tokens whose content changes slowly from frame to frame (a first-order autoregression
about a mean that all share, with a decaying spectrum). Their redundancy is made up: they are for timings, not quality.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastar.ann.launch import Tile, nearest_allowed
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.benchmark.timing import timed
from fastar.cache.base import CachePolicy, CacheSpec, Staged
from fastar.cache.change import Scratch
from fastar.cache.fused import choose, match
from fastar.cache.fused_commit import append, kept, observed, plan, renewed, slots_of
from fastar.cache.fused_merge import places_of_last
from fastar.cache.tempcache import TempCache

# conf/cache/tempcache_fast.yaml
FAST: dict[str, Any] = {"match_width": 64, "cost_by": "searched", "refresh": 0.0, "rounds": 1}


@dataclass(frozen=True, kw_only=True)
class CommitGeometry:
    """Sizes of a cache and its commits; the defaults are Wan2.1-1.3B at 480x832, three latent frames a chunk."""

    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    grid: tuple[int, int] = (30, 52)
    chunk_frames: int = 3

    def spec(self, device: torch.device) -> CacheSpec:
        """As a cache is told."""
        return CacheSpec(
            num_layers=self.layers, batch=1, num_heads=self.heads, head_dim=self.head_dim,
            tokens_per_frame=self.grid[0] * self.grid[1], rope=RotaryEmbedding(self.head_dim),
            compute_dtype=torch.bfloat16, device=device, chunk_frames=self.chunk_frames,
        )  # fmt: skip


class StandIn:
    """Chunks of slowly changing tokens, the same in every layer; see the module's words on what they are good for.

    Args:
        keep: correlation of a token's content from frame to frame.
    """

    def __init__(
        self, geometry: CommitGeometry, device: torch.device, keep: float = 0.9, seed: int = 0
    ) -> None:
        self.geometry, self.device, self.keep, self.frame = geometry, device, keep, 0
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rope = RotaryEmbedding(geometry.head_dim)
        self._spectrum = torch.arange(1, geometry.head_dim + 1, device=device) ** -0.5
        self._mean, self._state = 0.5 * self._noise(1), self._noise(self._tokens)

    @property
    def _tokens(self) -> int:
        return self.geometry.grid[0] * self.geometry.grid[1]

    def _noise(self, tokens: int) -> Tensor:
        shape = (3, 1, self.geometry.heads, tokens, self.geometry.head_dim)
        return torch.randn(shape, generator=self._generator, device=self.device) * self._spectrum

    def chunk(self) -> Staged:
        """The next chunk of one layer."""
        frames = []
        for _ in range(self.geometry.chunk_frames):
            fresh = self._noise(self._tokens)
            self._state = self.keep * self._state + (1 - self.keep**2) ** 0.5 * fresh
            frames.append(self._state + self._mean)
        q, k, v = torch.cat(frames, 3).bfloat16()
        positions = grid_positions(self.frame, len(frames), self.geometry.grid, device=self.device)
        self.frame += len(frames)
        roped, turned = (self._rope.rotate(x, positions) for x in (q, k))
        return Staged(q_raw=q, k_raw=k, k=turned, v=v, positions=positions, q=roped)


def commit_rows(
    budgets: Sequence[float],
    options: dict[str, Any],
    geometry: CommitGeometry,
    *,
    device: torch.device,
    repeats: int = 7,
    chunks: Callable[[], Staged] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows budget_frames, slots, contents, and milliseconds of all layers: of each step, total, and as a graph.

    Steps are timed alone, so that they need not add up to the total. `merge` is the choice of merges and their
    features, `edit` all that is written to the slots, `total` prepare and finish with what the host does between
    launches, `graph` the same captured (None without a GPU).

    Args:
        options: of `TempCache`, but for the budget.
        chunks: called for every chunk, what all layers stage; None for stand-ins.
    """
    for budget in budgets:
        take = chunks or StandIn(geometry, device).chunk
        policy = TempCache(budget_frames=budget, commit_by="fused", **options)
        policy.bind(geometry.spec(device))
        while policy.filled < policy.capacity_slots():
            stage(policy, take())
            policy.commit(policy.next_frame, geometry.chunk_frames)
        stage(policy, take())
        yield {
            "budget_frames": budget,
            "slots": policy.filled,
            "contents": "stand-in" if chunks is None else "given",
            **{name: 1e3 * seconds for name, seconds in _steps(policy, device, repeats).items()},
        }


def stage(policy: CachePolicy, chunk: Staged) -> None:
    """The same chunk in all layers."""
    for layer in range(policy.spec.num_layers):
        place(policy, layer, chunk)


def place(policy: CachePolicy, layer: int, chunk: Staged) -> None:
    """Stage a chunk in one layer; where attention would have left it, if the policy has room for that."""
    tokens, k, v = chunk.k.shape[2], chunk.k, chunk.v
    room = policy.room(layer, tokens)
    if room is not None:
        k, v = room.k[:, :, -tokens:, : k.shape[-1]], room.v[:, :, -tokens:]
        k.copy_(chunk.k)
        v.copy_(chunk.v)
    policy.stage(layer, replace(chunk, k=k, v=v))


@torch.no_grad()
def _steps(policy: TempCache, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each step of a commit of what is staged, all layers together."""
    spec, staged = policy.spec, [policy._staged[layer] for layer in range(policy.spec.num_layers)]
    layers, arrived, frame = range(spec.num_layers), staged[0].k.shape[2], spec.tokens_per_frame
    extras = {name: torch.cat([own[name] for own in policy._extras]) for name in policy._extras[0]}
    buffer, total_slots = policy._buffers.part(layers), policy.filled + arrived
    append(policy, buffer, staged)
    start, stop, known = policy.regions(total_slots, arrived)
    inside, surplus = buffer.narrow(start, stop), total_slots - policy.capacity_slots()

    slots = slots_of(policy, inside, extras["moment"])
    old = inside["partner"].to(torch.int32).flatten(0, 1)
    partner, cost = match(slots, old, known, frame, policy.weighting)

    def merge() -> tuple[Tensor, ...]:
        again = policy.refresh > 0
        _, gone, moved, _, rows = choose(
            slots, partner, cost, surplus, policy.rounds, policy.weighting, first=0, again=again
        )
        return gone, moved, rows

    def renew() -> dict[str, Tensor]:
        found = renewed(policy, slots, inside["position"], gone, moved, cost, surplus, arrived)
        return kept(slots, found, places_of_last(gone, rows))

    gone, moved, rows = merge()
    edit, _ = plan(policy, layers, buffer, staged, extras)

    def total() -> None:
        policy._take_in(policy._commit_layers(Scratch()))

    calls: dict[str, Callable[[], object]] = {
        "append": lambda: append(policy, buffer, staged),
        "moment": lambda: observed(policy, staged, extras),
        "features": lambda: slots_of(policy, inside, extras["moment"]),
        "match": lambda: match(slots, old, known, frame, policy.weighting),
        "merge": merge,
        "renew": renew,
        "edit": lambda: edit.apply(buffer),
        "total": total,
    }
    seconds = {name: timed(call, device=device, repeats=repeats).median for name, call in calls.items()}
    if device.type == "cuda":
        seconds["graph"] = timed(total, device=device, repeats=repeats, captured=True).median
    return seconds


def tile_rows(
    widths: Sequence[int],
    tiles: Sequence[Tile],
    geometry: CommitGeometry,
    *,
    device: torch.device,
    repeats: int = 7,
) -> Iterator[dict[str, Any]]:
    """Rows width, tile, ms, tflops of a commit's search: a chunk's tokens of all layers against another's."""
    tokens = geometry.chunk_frames * geometry.grid[0] * geometry.grid[1]
    problems = geometry.layers * geometry.heads
    for width in widths:
        queries, keys = torch.randn(2, problems, tokens, width, device=device).bfloat16()
        offset = -0.5 * keys.float().square().sum(-1)
        for tile in tiles:
            search = partial(nearest_allowed, queries, keys, offset, None, tile)
            seconds = timed(search, device=device, repeats=repeats).median
            flops = 2 * problems * tokens**2 * width
            yield {"width": width, "tile": str(tile), "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def main() -> None:
    """Budgets of 3 to 18 latent frames, with the fast setting, some near it and the default: one line of JSON each.

    python -m fastar.benchmark.commit
    """
    device, geometry = torch.device("cuda"), CommitGeometry()
    settings = {
        "fast": FAST, "fast, match_width=32": FAST | {"match_width": 32},
        "fast, rounds=2, match_width=32": FAST | {"rounds": 2, "match_width": 32},
        "fast, match_frames=1": FAST | {"match_frames": 1}, "default": {},
    }  # fmt: skip
    for name, options in settings.items():
        for row in commit_rows([3.1, 6, 12, 18], options, geometry, device=device, repeats=5):
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            print(json.dumps({"setting": name, **row, "peak_gib": peak}), flush=True)  # noqa: T201
    tiles = [
        Tile(queries, keys, 256, warps, 3) for queries, keys, warps in
        ((128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4))
    ]  # fmt: skip
    for row in tile_rows([64, 128, 256], tiles, geometry, device=device, repeats=5):
        print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
