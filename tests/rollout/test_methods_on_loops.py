"""Every method on every sampling loop; saved, resumed, repeated; prompts that change; protocols."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone, Prompts
from fastar.cache import CachePolicy, EmptyCache, StockWindow, TempCache
from fastar.compare.methods import method_of, resolved
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.protocols import TeeCache, lockstep_a, lockstep_b
from fastar.rollout.rollout import NonFiniteError, Rollout
from fastar.sparsity import AnnSA, RankedCA, TokenTags
from fastar.sparsity.prompt_scores import ExactMass
from tests.rollout.loops import (
    CHUNK,
    LOOPS,
    STAGGERED,
    WIDTH,
    Passes,
    actions,
    exact,
    generated,
    prompts,
    started,
    stock,
)
from tests.rollout.test_rollout import equal_states
from tests.small import CONF, LATENT, clip, small_backbone, text_backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture(scope="module")
def reader() -> Backbone:
    """The same with a text stream."""
    return small_backbone(text_dim=WIDTH)


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
    if node["cache"].get("commit_by") == "fused":  # made for a GPU, and for wider heads than these
        node = node | {"cache": node["cache"] | {"commit_by": "plain", "match_width": 16}}
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


def test_chunks_in_flight_go_on_in_a_loop_that_keeps_them(backbone: Backbone) -> None:
    rollout = started(backbone, LOOPS["rolling_forcing"])
    rollout.step(actions(15))
    other = started(backbone, LOOPS["longlive"])
    with pytest.raises(ValueError, match="has 4 chunks in flight, more than this loop keeps between steps"):
        other.load_state_dict(rollout.state_dict())


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


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("name", STAGGERED)
def test_protocols_hold_chunks_in_flight_against_dense(backbone: Backbone, name: str, start: int) -> None:
    """Dense and a window with room for everything reproduce dense's trajectory, an empty cache does not."""
    loop, frames = LOOPS[name], 18 + start
    history, told = clip(start)[0], actions(frames)
    dense = started(backbone, loop, end_frame=frames)
    if start:
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
