"""The published sampling loops: their levels, their passes, and what these read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones import Backbone
from fastar.rollout.loops import ChunkLoop, StaggeredLoop
from fastar.rollout.noise import chunk_noise
from tests.rollout.loops import (
    CHUNK,
    CONFIGS,
    LOOPS,
    STAGGERED,
    Passes,
    actions,
    exact,
    generated,
    started,
    stock,
)
from tests.small import GRID, LATENT, TOKENS, make, poses, small_backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


# -- levels and passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("self_forcing", [1000, 937.5, 833.33, 625]),
        ("longlive", [1000, 937.5, 833.33, 625]),
        ("longlive_infinity", [1000, 937.5, 833.33, 625]),
        ("rolling_forcing", [1000, 952.38, 882.35, 769.23, 555.56]),
        ("matrix_game_2", [1000, 908.84, 713.98]),
        ("causvid", [1000, 757, 522]),
    ],
)
def test_levels_are_the_published_ones(name: str, expected: list[float]) -> None:
    loop = LOOPS[name]
    assert list(loop.timesteps) == pytest.approx(expected, abs=0.006)
    assert loop.renoise and loop.commit_timestep == 0


WINDOWS = {
    "self_forcing": {"attended_frames": 21},
    "causvid": {"attended_frames": 21},
    "longlive": {"attended_frames": 12, "sink_frames": 3},
    "longlive_infinity": {"attended_frames": 12, "sink_frames": 3, "move_sink": True},
    "rolling_forcing": {"attended_frames": 21, "sink_frames": 3, "move_sink": True, "sink_in_commits": False},
    "diffusion_forcing": {"attended_frames": 35},
    "matrix_game_2": {"attended_frames": 6},
}


def test_windows_are_the_published_ones() -> None:
    """What `uncached` below takes for granted. SkyReels-V2: 30 frames in flight and the overlap of two segments."""
    assert {name: config.window for name, config in CONFIGS.items()} == WINDOWS
    assert {name: config.get("causal", True) for name, config in CONFIGS.items()} == {
        name: name != "rolling_forcing" for name in WINDOWS
    }


def test_skyreels_constants() -> None:
    loop = make(CONFIGS["diffusion_forcing"], chunk_frames=5)
    assert (len(loop.timesteps), loop.stagger, loop.causal, loop.renoise) == (30, 5, True, False)
    assert (loop.commit_timestep, loop.commit_noise, loop.frames_in_flight) == (20, True, 30)
    assert loop.timesteps[15] == pytest.approx(1000 * 8 * 0.5 / (1 + 7 * 0.5))


@pytest.mark.parametrize("name", [name for name in LOOPS if name not in STAGGERED])
def test_a_chunk_loop_runs_each_chunk_alone(backbone: Backbone, name: str) -> None:
    passes, loop = Passes(), LOOPS[name]
    generated(started(backbone, loop, recorders=[passes], end_frame=21), 21)
    steps = len(loop.timesteps)
    chunk = [("denoise", (step,)) for step in range(steps)] + [("commit", (0,))]
    assert passes.seen == [(k, first, CHUNK, s) for first in range(0, 21, CHUNK) for k, s in chunk]
    assert len(passes.seen) == 7 * loop.passes_per_chunk
    if name == "self_forcing":
        assert len(passes.seen) == 35, "forwards for 21 latent frames"


def test_rolling_forcing_rolls_a_window_of_five_chunks(backbone: Backbone) -> None:
    passes, chunks = Passes(), 8
    generated(
        started(backbone, LOOPS["rolling_forcing"], recorders=[passes], end_frame=chunks * CHUNK),
        chunks * CHUNK,
    )
    windows = [seen for seen in passes.seen if seen[0] == "denoise"]
    published = [(max(0, n - 4), min(chunks - 1, n)) for n in range(chunks + 4)]  # first and last chunk
    assert [(first // CHUNK, (first + frames) // CHUNK - 1) for _, first, frames, _ in windows] == published
    for number, (start, stop) in enumerate(published):
        assert windows[number][3] == tuple(number - chunk for chunk in range(start, stop + 1))
    emitted = passes.seen[5:]  # the first chunk takes five windows, every other one window
    assert [kind for kind, *_ in emitted] == ["commit", "denoise"] * (chunks - 1) + ["commit"]
    assert [(f, n) for kind, f, n, _ in emitted if kind == "commit"] == [
        (i * CHUNK, CHUNK) for i in range(chunks)
    ]
    assert LOOPS["rolling_forcing"].passes_per_chunk == 2


@pytest.mark.parametrize(("steps", "stagger"), [(6, 2), (5, 2), (4, 3), (3, 3), (3, 7), (5, 1)])
def test_steps_follow_the_rule_of_diffusion_forcing(steps: int, stagger: int) -> None:
    """A chunk is `stagger` steps behind the one before it, until that is clean (SkyReels-V2's matrix of steps)."""
    loop = StaggeredLoop(
        chunk_frames=CHUNK, timesteps=[1000 - n for n in range(steps)], stagger=stagger, causal=True
    )
    chunks, expected, row = 6, [], [0] * 6
    while row[-1] < steps:
        new = [row[0] + 1]
        for i in range(1, chunks):
            new.append(row[i] + 1 if row[i - 1] >= steps else max(0, new[i - 1] - stagger))
        new = [min(step, steps) for step in new]
        expected.append(
            [(i, step - 1) for i, (old, step) in enumerate(zip(row, new, strict=True)) if step > old]
        )
        row = new
    found, done, flight = [], 0, []  # flight: steps made
    while done < chunks:
        for context in loop.denoise_passes(done * CHUNK, flight, chunks * CHUNK):
            found.append([(part.first_frame // CHUNK, part.step) for part in context.parts])
            flight = [part.step + 1 for part in context.parts]
            assert context.num_frames == len(flight) * CHUNK <= loop.frames_in_flight
            assert context.timesteps == tuple(t for part in context.parts for t in part.timesteps)
        done, flight = done + 1, flight[1:]
    assert found == expected


@pytest.mark.parametrize("name", STAGGERED)
def test_a_video_in_flight_is_the_same_in_any_batch(backbone: Backbone, name: str) -> None:
    """Up to the order of sums: chunks in flight draw their noise each by seed and place."""
    both, one = (
        generated(started(backbone, LOOPS[name], seeds=seeds, end_frame=15), 15) for seeds in ((4, 5), (5,))
    )
    torch.testing.assert_close(both[1:], one, rtol=0, atol=2e-5)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_as_many_steps_behind_as_there_are_is_one_chunk_at_a_time(backbone: Backbone) -> None:
    loop = LOOPS["self_forcing"]
    fields = {name: getattr(loop, name) for name in ("chunk_frames", "timesteps", "renoise")}
    behind = StaggeredLoop(**fields, stagger=4, causal=False)
    wanted = generated(started(backbone, loop), 12)
    assert torch.equal(generated(started(backbone, behind), 12), wanted)
    assert behind.most_in_flight == 1


def test_loops_that_cannot_be_run_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="stagger must be at least 1, got 0"):
        replace(LOOPS["rolling_forcing"], stagger=0)
    with pytest.raises(ValueError, match=r"commit_noise needs a commit_timestep within 0\.\.1000, got 0"):
        replace(LOOPS["diffusion_forcing"], commit_timestep=0)


# -- cached equals uncached --------------------------------------------------------------------------------------------


@dataclass
class Reads:
    """What a chunk's queries read: key frames, where their keys stand, and where the first query frame stands."""

    frames: list[int]
    places: list[int]
    query: int


class Uncached:
    """Attention over the whole video at once; `reads` says of the first frame of a chunk what the chunk reads."""

    def __init__(self, rope: RotaryEmbedding, reads: Callable[[int], Reads]) -> None:
        self.rope, self.reads = rope, reads

    def __call__(self, stream: str, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for start in range(0, q.shape[2] // TOKENS, CHUNK):
            reads = self.reads(start)
            index = torch.cat([torch.arange(TOKENS) + frame * TOKENS for frame in reads.frames])
            places = torch.cat([grid_positions(place, 1, GRID) for place in reads.places])
            queries = self.rope.rotate(
                q[:, :, start * TOKENS : (start + CHUNK) * TOKENS], grid_positions(reads.query, CHUNK, GRID)
            )
            keys = self.rope.rotate(k[:, :, index], places)
            outs.append(F.scaled_dot_product_attention(queries, keys, v[:, :, index]))
        return torch.cat(outs, dim=2)


def past_of(loop: ChunkLoop, cache: str, past: int, own: int, commits: bool) -> tuple[list[int], list[int]]:
    """Cached frames that a pass of `own` frames reads after `past` frames, and where their keys stand."""
    if cache == "dense":
        return list(range(past)), list(range(past))
    window = {"sink_frames": 0, "move_sink": False, "sink_in_commits": True} | dict(loop.window or {})
    sink = 0 if commits and not window["sink_in_commits"] else window["sink_frames"]
    newest = list(range(past))[max(min(sink, past), past - max(0, window["attended_frames"] - own - sink)) :]
    first = list(range(min(sink, past)))
    place = [past - len(newest) - len(first) + i for i in first] if window["move_sink"] else first
    return first + newest, place + newest


@torch.inference_mode()
def uncached(backbone: Backbone, loop: Any, cache: str, chunks: int, *, from_zero: bool = False) -> Tensor:
    """The video by forwards over everything: chunks committed, then chunks in flight. `from_zero`: RoPE of each read
    starts at 0, as LongLive's mode without end has it."""
    steps, shape = len(loop.timesteps), (CHUNK, *LATENT)
    levels = [t / 1000 for t in loop.timesteps] + [0.0]
    stagger, causal = getattr(loop, "stagger", steps), getattr(loop, "causal", True)
    told = actions(chunks * CHUNK)
    placed = poses(backbone, told)
    kept: list[Tensor] = []  # committed chunks as the model saw them
    video: list[Tensor] = []
    flight: list[tuple[int, Tensor]] = []

    def draw(chunk: int, number: int) -> Tensor:
        return chunk_noise([5], chunk * CHUNK, number, shape, "cpu")

    def reads(start: int) -> Reads:
        done = len(kept) * CHUNK
        if start < done:
            frames, places = past_of(loop, cache, start, CHUNK, commits=True)
            own = list(range(start, start + CHUNK))
        else:
            frames, places = past_of(loop, cache, done, len(flight) * CHUNK, commits=False)
            own = list(range(done, start + CHUNK if causal else done + len(flight) * CHUNK))
        shift = (places + own)[0] if from_zero else 0
        return Reads(frames + own, [place - shift for place in places + own], start - shift)

    while len(video) < chunks:
        following = len(kept) + len(flight)
        if following < chunks and (not flight or flight[-1][0] >= stagger):
            flight.append((0, draw(following, 0)))
        whole = torch.cat([*kept, *(latents for _, latents in flight)], dim=1)
        now = [loop.commit_timestep] * len(kept) + [loop.timesteps[step] for step, _ in flight]
        timesteps = torch.tensor(now, dtype=torch.float32).repeat_interleave(CHUNK)[None]
        stop = whole.shape[1]
        velocity = backbone.transformer(
            whole, timesteps, attend=Uncached(backbone.transformer.rope, reads), actions=told[:, :stop],
            poses=placed[:, :stop],
        ).split(CHUNK, dim=1)[len(kept) :]  # fmt: skip
        for place, (step, latents) in enumerate(flight):
            sigma, after = levels[step], levels[step + 1]
            clean = latents - sigma * velocity[place]
            if step + 1 == steps:
                latents = clean
            elif loop.renoise:
                latents = (1 - after) * clean + after * draw(len(kept) + place, step + 1)
            else:
                latents = latents + (after - sigma) * velocity[place]
            flight[place] = (step + 1, latents)
        if flight[0][0] == steps:
            clean = flight.pop(0)[1]
            share = loop.commit_timestep / 1000 if loop.commit_noise else 0.0
            kept.append((1 - share) * clean + share * draw(len(video), steps))
            video.append(clean)
    return torch.cat(video, dim=1)


@pytest.mark.parametrize("cache", ["dense", "stock"])
@pytest.mark.parametrize("name", LOOPS)
def test_cached_equals_uncached(backbone: Backbone, name: str, cache: str) -> None:
    """Until the window has moved on by a few chunks."""
    loop = LOOPS[name]
    chunks = {"matrix_game_2": 5, "longlive": 7, "longlive_infinity": 7}.get(name, 9)
    made = generated(
        started(
            backbone, loop, partial(stock, loop) if cache == "stock" else exact, end_frame=chunks * CHUNK
        ),
        chunks * CHUNK,
    )
    wanted = uncached(backbone, loop, cache, chunks, from_zero=name == "longlive_infinity")
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    if cache == "stock":
        assert (
            made - generated(started(backbone, loop, end_frame=chunks * CHUNK), chunks * CHUNK)
        ).abs().max() > 1e-3


def test_turning_the_sink_matters(backbone: Backbone) -> None:
    still, moved = (
        generated(started(backbone, LOOPS[name], partial(stock, LOOPS[name])), 21)
        for name in ("longlive", "longlive_infinity")
    )
    assert torch.equal(still[:, :12], moved[:, :12]) and (still - moved).abs().max() > 1e-3


@pytest.mark.parametrize("name", LOOPS)
def test_no_length_is_too_long(backbone: Backbone, name: str) -> None:
    """Twice the window that a model was trained with: the window's memory stays, and dense by name takes everything."""
    loop = LOOPS[name]
    assert loop.window is not None
    frames = 2 * loop.window["attended_frames"] // CHUNK * CHUNK
    rollout = started(backbone, loop, partial(stock, loop), end_frame=frames)
    assert torch.isfinite(generated(rollout, frames)).all()
    cache = rollout.state.cache
    assert cache.bytes_used() == cache.capacity_bytes() < exact_bytes(frames)


def exact_bytes(frames: int) -> int:
    cache = exact()
    cache.bind(started(small_backbone(), LOOPS["self_forcing"]).state.cache.spec)
    return frames * TOKENS * cache.slot_bytes() * cache.spec.num_layers
