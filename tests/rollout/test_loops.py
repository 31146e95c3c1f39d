"""The published sampling loops: their passes, what these read, and every method on every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones import Backbone, Prompts
from fastar.cache import CachePolicy, DenseCache, EmptyCache, StockWindow, TempCache
from fastar.compare.methods import method_of, resolved
from fastar.rollout.loops import ChunkLoop, StaggeredLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.noise import chunk_noise
from fastar.rollout.protocols import TeeCache, lockstep_a, lockstep_b
from fastar.rollout.rollout import NonFiniteError, Rollout
from fastar.sparsity import AnnSA, RankedCA, TokenTags
from fastar.sparsity.prompt_scores import ExactMass
from tests.rollout.test_rollout import equal_states
from tests.small import (
    ACTIONS,
    CONF,
    GRID,
    LATENT,
    TOKENS,
    clip,
    configs,
    make,
    poses,
    small_backbone,
    text_backbone,
)

CHUNK, WIDTH = 3, 8
CONFIGS = {name: config for name, config in configs("rollout").items() if name != "few_step"}
SHORTER = {
    "diffusion_forcing": {"timesteps": {"num_steps": 6}, "stagger": 2, "window": {"attended_frames": 15}}
}
"""Thirty steps are many for a test: six, of which a chunk makes two before the next one is begun."""


LOOPS: dict[str, Any] = {
    name: make(config, chunk_frames=CHUNK, **SHORTER.get(name, {})) for name, config in CONFIGS.items()
}
STAGGERED = [name for name, loop in LOOPS.items() if loop.most_in_flight > 1]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture(scope="module")
def reader() -> Backbone:
    """The same with a text stream."""
    return small_backbone(text_dim=WIDTH)


def exact() -> DenseCache:
    return DenseCache(storage="float32")


def stock(loop: ChunkLoop) -> StockWindow:
    assert loop.window is not None
    return StockWindow(storage="float32", **loop.window)


def prompts(batch: int = 1, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return Prompts(torch.randn(batch, 9, WIDTH, generator=generator), torch.full((batch,), 7))


def started(
    backbone: Backbone,
    loop: ChunkLoop,
    cache: Callable[[], CachePolicy] = exact,
    *,
    end_frame: int | None = None,
    recorders: Any = (),
    **method: Any,
) -> Rollout:
    given = prompts() if backbone.config.transformer.text_dim else None
    return start_rollout(
        backbone, Method(name="test", cache=cache, **method), loop=loop, seeds=[5], prompts=given,
        recorders=recorders, end_frame=end_frame,
    )  # fmt: skip


def actions(frames: int) -> Tensor:
    return torch.randint(ACTIONS, (1, frames), generator=torch.Generator().manual_seed(1))


def generated(rollout: Rollout, frames: int) -> Tensor:
    """The video from where the rollout stands to frame `frames`, where it ends."""
    first = rollout.next_frame
    return torch.cat(list(rollout.generate(frames - first, actions(frames)[:, first:])), dim=1)


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


def test_skyreels_constants() -> None:
    loop = make(CONFIGS["diffusion_forcing"], chunk_frames=5)
    assert (len(loop.timesteps), loop.stagger, loop.causal, loop.renoise) == (30, 5, True, False)
    assert (loop.commit_timestep, loop.commit_noise, loop.frames_in_flight) == (20, True, 30)
    assert loop.timesteps[15] == pytest.approx(1000 * 8 * 0.5 / (1 + 7 * 0.5))


class Passes:
    """What every pass covered: kind, first frame, frames, and the steps of its chunks."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, tuple[int, ...]]] = []
        self._steps: list[int] = []

    def on_attend(self, event: AttendEvent) -> None:
        if event.layer or event.stream != "self":
            return
        context, (first, stop) = event.context, event.context.pass_frames
        self._steps.append(context.step)
        if context.first_frame + context.num_frames == stop:
            self.seen.append((context.kind.value, first, stop - first, tuple(self._steps)))
            self._steps = []


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


# -- every method on every loop ----------------------------------------------------------------------------------------


METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def nodes() -> dict[str, dict[str, Any]]:
    """All methods of conf/method as the config of a comparison resolves them."""
    asked = ["debug=tiny_text", f"method=[{','.join(METHODS)}]", "block_queries=4", "block_keys=4"]
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        return resolved(compose("compare", overrides=[*asked, "rollout=longlive_infinity"]))


NEEDS = {"ranked_faiss": "faiss"}
"""Methods that need a package which not every machine has."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOOPS)
def test_every_method_runs_on_every_loop(reader: Backbone, nodes: Any, name: str, method: str) -> None:
    """With prompts, and with actions: history, then chunks until the last ones are alone in flight."""
    if method in NEEDS:
        pytest.importorskip(NEEDS[method])
    loop, frames, node = LOOPS[name], 18, nodes[method]
    if method == "stock":  # conf/method/stock.yaml takes the window of the rollout
        assert dict(LOOPS["longlive_infinity"].window).items() <= node["cache"].items()
        node = node | {"cache": {"_target_": node["cache"]["_target_"], **loop.window}}
    made_of = method_of(method, node)
    rollout = start_rollout(reader, made_of, loop=loop, seeds=[5], prompts=prompts(), end_frame=frames)
    rollout.prefill(clip(12)[0], actions(12))
    made = generated(rollout, frames)
    assert torch.isfinite(made).all() and made.shape == (1, 6, *LATENT) and rollout.next_frame == frames
    bound = rollout.state.cache.capacity_bytes()
    assert bound is None or rollout.state.cache.bytes_used() <= bound
    assert rollout.state.in_flight() == {} and "in_flight" not in rollout.state_dict()


class Planned:
    """Steps of the chunks whose self-attention was sparse, and those whose prompt was."""

    def __init__(self) -> None:
        self.pairs: set[int] = set()
        self.words: set[int] = set()
        self.passes: set[int] = set()

    def on_attend(self, event: AttendEvent) -> None:
        if event.context.kind != PassKind.DENOISE:
            return
        if event.context.chunks:
            raise AssertionError("measures see one chunk at a time")
        self.passes.add(event.context.step)
        if event.plan is not None:
            self.pairs.add(event.context.step)
        if event.selection is not None and event.selection.keep is not None:
            self.words.add(event.context.step)


SPARSE: dict[str, dict[str, Any]] = {
    "words": {"cross_attention": partial(RankedCA, scorer=ExactMass(), share=0.4, warmup_share=0.0)},
    "words_anew": {
        "cross_attention": partial(
            RankedCA, scorer=ExactMass(), share=0.4, scope="prompt", rebuild="pass", warmup_share=0.0
        )
    },
    "tags": {
        "self_attention": partial(
            AnnSA, source="prompt", density=0.3, block_q=4, block_k=4, commit_dense=False
        ),
        "cross_attention": TokenTags,
    },
}


@pytest.mark.parametrize("name", STAGGERED)
def test_chunks_in_one_pass_each_have_a_schedule_of_their_own(reader: Backbone, name: str) -> None:
    """The noisiest are dense while the cleaner ones are sparse; a chunk's first pass has no buckets or scores yet."""
    loop, frames = LOOPS[name], 8 * CHUNK
    steps = len(loop.timesteps)
    for kind, options in SPARSE.items():
        seen = Planned()
        generated(started(reader, loop, recorders=[seen], end_frame=frames, **options), frames)
        assert seen.passes == set(range(steps))
        if kind == "tags":
            assert seen.pairs == {step for step in range(1, steps) if step / steps >= 0.3} and not seen.words
        else:
            assert seen.words == set(range(1, steps)) and not seen.pairs


# -- saved states ------------------------------------------------------------------------------------------------------

RESUMED = {
    "dense": {},
    "tempcache": {"cache": partial(TempCache, budget_frames=8)},
    **SPARSE,
}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in LOOPS for method in RESUMED if name in STAGGERED or method not in SPARSE],
)
def test_saved_on_the_way_and_resumed_to_the_same_bits(
    reader: Backbone, name: str, method: str, tmp_path: Any
) -> None:
    """Also into a rollout that has been used, and with several chunks in flight."""
    loop, frames = LOOPS[name], 21
    options: dict[str, Any] = {"cache": exact, "end_frame": frames} | RESUMED[method]
    rollout = started(reader, loop, **options)
    for first in (0, 3, 6):
        rollout.step(actions(frames)[:, first : first + loop.frames_in_flight])
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(saved.get("in_flight", [])) == (loop.most_in_flight - 1)
    wanted = generated(rollout, frames)
    fresh = started(reader, loop, **options)
    for resumed in (fresh, rollout):
        resumed.load_state_dict(saved)
        assert resumed.next_frame == 9 and torch.equal(generated(resumed, frames), wanted)


@pytest.mark.parametrize("method", RESUMED)
@pytest.mark.parametrize("name", STAGGERED)
def test_a_pass_that_fails_can_be_repeated(
    reader: Backbone, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, frames = LOOPS[name], 18
    options: dict[str, Any] = {"cache": exact, "end_frame": frames} | RESUMED[method]
    rollout, twin = (started(reader, loop, **options) for _ in range(2))
    for each in (rollout, twin):
        each.step(actions(frames))
    bias = reader.transformer.head.head.bias
    before, kept = rollout.state_dict(), bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match="denoising of frames 3 to 5"):
        rollout.step(actions(frames)[:, 3:])
    with torch.no_grad():
        bias.copy_(kept)
    first = rollout.denoise(actions(frames)[:, 3:])
    assert torch.equal(rollout.denoise(actions(frames)[:, 3:]), first), "and without a commit, too"
    assert torch.equal(generated(rollout, frames), generated(twin, frames))
    rollout.load_state_dict(before)
    assert equal_states(rollout.state_dict(), before)


def test_a_video_that_ends_or_goes_on(backbone: Backbone) -> None:
    """Where the video ends no chunk is begun: it matters to those that see the chunks after them, to no other."""
    loop, told = LOOPS["rolling_forcing"], actions(30)
    ends, on = started(backbone, loop, end_frame=9), started(backbone, loop)
    short = torch.cat([ends.step(told[:, first:9]) for first in (0, 3, 6)], dim=1)
    long = torch.cat([on.step(told[:, first:]) for first in (0, 3, 6)], dim=1)
    assert not ends.state_dict().get("in_flight") and len(on.state_dict()["in_flight"]) == 4
    assert (short - long).abs().max() > 1e-3
    with pytest.raises(
        ValueError, match="15 frames are in flight and only 9 actions given: give those of 15 frames"
    ):
        on.step(told[:, 9:18])
    causal = LOOPS["diffusion_forcing"]
    ends, on = started(backbone, causal, end_frame=9), started(backbone, causal)
    for first in (0, 3, 6):
        wanted, found = on.step(told[:, first:]), ends.step(told[:, first:9])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# -- prompts that change -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Backbone:
    """A backbone of words alone: frames of one that follows its pose cannot be cached again."""
    return text_backbone()


def written(backbone: Backbone, loop: ChunkLoop, seed: int = 0, **options: Any) -> Rollout:
    method = Method(name="test", **({"cache": partial(stock, loop)} | options))
    return start_rollout(backbone, method, loop=loop, seeds=[5], prompts=words_of(seed))


def words_of(seed: int) -> Prompts:
    return Prompts(torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(seed)), torch.tensor([7]))


def keys(rollout: Rollout) -> tuple[list[int], Tensor]:
    """Frames that the second layer's keys stand at, and these by frame, [frames, H, tokens, D]."""
    view = rollout.state.cache.view(1)
    assert view.positions is not None
    frames = view.positions[0, 0, :, 0].unique_consecutive().tolist()
    return frames, view.k[0].unflatten(1, (len(frames), -1)).transpose(0, 1).clone()


@pytest.mark.parametrize("name", ["longlive", "longlive_infinity"])
def test_longlive_caches_its_last_frames_again_under_a_new_prompt(
    words: Backbone, name: str, tmp_path: Any
) -> None:
    """Twelve frames, of which the window keeps the newest six; the sink stays as it was made."""
    loop = LOOPS[name]
    rollout = written(words, loop)
    made = torch.cat(list(rollout.generate(21)), dim=1)
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    frames, before = keys(rollout)
    passes = Passes()
    rollout.state.recorders.append(passes)
    rollout.change_prompts(words_of(1), made[:, -12:])
    assert [seen[:3] for seen in passes.seen] == [("rewrite", first, CHUNK) for first in (9, 12, 15, 18)]
    again, after = keys(rollout)
    assert again == frames and len(frames) == 9 and rollout.next_frame == 21
    assert (
        torch.equal(after[:3], before[:3]) and (after[3:] - before[3:]).flatten(1).abs().amax(1).min() > 1e-3
    )
    wanted = torch.cat(list(rollout.generate(6)), dim=1)
    fresh = written(words, loop, seed=2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fresh.change_prompts(words_of(1), made[:, -12:])
    assert torch.equal(torch.cat(list(fresh.generate(6)), dim=1), wanted)


@pytest.mark.parametrize("name", STAGGERED)
def test_chunks_in_flight_go_on_under_a_new_prompt(words: Backbone, name: str) -> None:
    """What was decided by the old one is forgotten; frames in flight stay in flight while others are cached again."""
    loop = LOOPS[name]
    scored = partial(RankedCA, scorer=ExactMass(), share=0.4, warmup_share=0.0)
    rollout, twin = (written(words, loop, cache=exact, cross_attention=scored) for _ in range(2))
    made, _ = (torch.cat(list(each.generate(12)), dim=1) for each in (rollout, twin))
    before = rollout.state_dict()["in_flight"]
    assert rollout.state.in_flight()["cross"].keys() == {chunk["first_frame"] for chunk in before}
    rollout.change_prompts(words_of(1), made[:, -6:])
    assert equal_states(dict(enumerate(rollout.state_dict()["in_flight"])), dict(enumerate(before)))
    assert rollout.state.in_flight() == {} and rollout.next_frame == 12
    assert (rollout.step() - twin.step()).abs().max() > 1e-3


# -- protocols ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGGERED)
def test_protocols_hold_chunks_in_flight_against_dense(backbone: Backbone, name: str) -> None:
    """Dense and a window with room for everything reproduce dense's trajectory, an empty cache does not."""
    loop, frames, start = LOOPS[name], 24, 6
    history, told = clip(start)[0], actions(frames)
    dense = started(backbone, loop, end_frame=frames)
    dense.prefill(history, told[:, :start])
    trajectory = torch.cat([history, generated(dense, frames)], dim=1)
    caches: dict[str, Callable[[], CachePolicy]] = {
        "dense": exact,
        "roomy": partial(StockWindow, attended_frames=90, storage="float32"),
        "empty": EmptyCache,
    }

    def a(done: int) -> dict[str, Tensor]:
        own = {key: make_cache() for key, make_cache in caches.items()}
        tee = TeeCache(exact(), list(own.values()))
        teacher = started(backbone, loop, lambda: tee, end_frame=frames)
        students = {
            key: started(backbone, loop, lambda cache=cache: cache, end_frame=frames)
            for key, cache in own.items()
        }
        chunks: dict[str, list[Tensor]] = {key: [] for key in own}
        for first, key, chunk in lockstep_a(teacher, students, trajectory, told, start, done=done):
            assert first == start + (done + len(chunks[key])) * CHUNK
            chunks[key].append(chunk)
        return {key: torch.cat(found, dim=1) for key, found in chunks.items()}

    def b(make_cache: Callable[[], CachePolicy], done: int) -> Tensor:
        rollout = started(backbone, loop, make_cache, end_frame=frames)
        return torch.cat(
            [chunk for _, chunk in lockstep_b(rollout, trajectory, told, start, done=done)], dim=1
        )

    wanted = trajectory[:, start:]
    for found in (a(0), {key: b(make_cache, 0) for key, make_cache in caches.items()}):
        assert torch.equal(found["dense"], wanted) and torch.equal(found["roomy"], wanted)
        assert (found["empty"] - wanted).abs().max() > 1e-2
    assert torch.equal(a(3)["empty"], a(0)["empty"][:, 3 * CHUNK :]), "taken up again"
    assert torch.equal(b(EmptyCache, 3), b(EmptyCache, 0)[:, 3 * CHUNK :])
