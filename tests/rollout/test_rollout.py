"""The rollout: its noise, what it refuses, and what it leaves behind when something fails."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone
from fastar.cache import DenseCache, TempCache, WindowCache
from fastar.rollout.noise import FirstNoise, chunk_noise
from fastar.rollout.rollout import NonFiniteError, Rollout
from tests.small import CHUNK, LATENT, clip, run, small_backbone, small_loop, small_rollout


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


# -- noise -----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_place_and_draw_alone() -> None:
    shape = (2, 3, 4, 4)
    together = chunk_noise([5, 6, 7], 8, 0, shape, "cpu")
    for place, seed in enumerate([5, 6, 7]):
        assert torch.equal(chunk_noise([seed], 8, 0, shape, "cpu")[0], together[place])
    assert torch.equal(chunk_noise([7, 5], 8, 0, shape, "cpu"), together[[2, 0]])
    torch.manual_seed(123)  # nor on the global state, nor does it move that
    before = torch.get_rng_state()
    assert torch.equal(chunk_noise([5, 6, 7], 8, 0, shape, "cpu"), together)
    assert torch.equal(torch.get_rng_state(), before)
    others = [
        chunk_noise(*key, shape, "cpu")[0] for key in (([5], 8, 1), ([5], 10, 0), ([6], 8, 0), ([58], 0, 0))
    ]
    others.append(together[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


def test_seeds_of_other_integer_types_are_the_same_seeds() -> None:
    shape = (1, 1, 2, 2)
    expected = chunk_noise([3], 0, 0, shape, "cpu")
    for seed in (np.int64(3), np.arange(4)[3], torch.tensor(3)):
        assert torch.equal(chunk_noise([seed], 0, 0, shape, "cpu"), expected)  # type: ignore[list-item]


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([chunk_noise([1, 2], first, 0, (2, 8, 16, 16), "cpu").flatten() for first in range(4)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and noise.dtype == torch.float32


def test_first_noise_is_drawn_ahead_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one chunk, once; another chunk's is drawn when it is asked for."""
    drawn: list[int] = []

    def on_the_cpu(
        seeds: list[int], first_frame: int, draw: int, shape: tuple[int, ...], device: object
    ) -> Tensor:
        drawn.append(first_frame)
        return chunk_noise(seeds, first_frame, draw, shape, "cpu")

    monkeypatch.setattr("fastar.rollout.noise.chunk_noise", on_the_cpu)
    shape = (2, 3, 4, 4)
    expected = {first: chunk_noise([5, 6], first, 0, shape, "cpu") for first in (0, 2, 4)}
    noise = FirstNoise([5, 6], shape, "cuda")
    assert torch.equal(noise.of(0), expected[0])
    noise.draw_ahead(2)
    noise.draw_ahead(2)
    assert drawn == [0, 2] and torch.equal(noise.of(2), expected[2]) and drawn == [0, 2]
    assert torch.equal(noise.of(2), expected[2]) and drawn == [0, 2, 2]
    noise.draw_ahead(4)
    assert torch.equal(noise.of(0), expected[0]) and drawn == [0, 2, 2, 4, 0]
    noise = FirstNoise([5, 6], shape, "cpu")
    noise.draw_ahead(2)
    assert len(drawn) == 5, "a CPU has nothing else to do meanwhile"


def test_the_next_chunks_noise_is_drawn_while_passes_run(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the host looks at what they made; where drawing fails, the chunk can be repeated."""
    order: list[str] = []
    look = Rollout._require_finite

    def draw_ahead(noise: FirstNoise, first_frame: int) -> None:
        order.append(f"draw {first_frame}")
        if len(order) == 1:
            raise RuntimeError("no memory to pin")

    def require_finite(rollout: Rollout, finite: Tensor, what: str) -> None:
        order.append(what)
        look(rollout, finite, what)

    rollout, twin = small_rollout(backbone), small_rollout(backbone)
    latents, actions = clip(8)
    for each in (rollout, twin):
        each.prefill(latents[:, :4], actions[:, :4])
    expected = torch.cat(list(twin.generate(4, actions[:, 4:])), dim=1)
    monkeypatch.setattr(FirstNoise, "draw_ahead", draw_ahead)
    monkeypatch.setattr(Rollout, "_require_finite", require_finite)
    with pytest.raises(RuntimeError, match="pin"):
        rollout.step(actions[:, 4:6])
    assert torch.equal(torch.cat(list(rollout.generate(4, actions[:, 4:])), dim=1), expected)
    assert equal_states(rollout.state_dict(), twin.state_dict())
    assert order[1:4] == ["draw 6", "denoising", "commit pass"] and order[4] == "draw 8"


@pytest.mark.gpu
def test_chunks_begin_with_what_was_drawn_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small_backbone()
    backbone.transformer.to("cuda")
    made, asked = [], []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(FirstNoise, "draw_ahead", lambda self, first_frame: asked.append(first_frame))
        made.append(run(small_rollout(backbone, DenseCache, engine="sdpa")))
    assert torch.equal(*made) and asked[0] > 0


@pytest.mark.parametrize("renoise", [False, True])
def test_a_video_is_the_same_in_any_batch(backbone: Backbone, renoise: bool) -> None:
    """Up to the order of sums in batched matrix products."""
    latents, actions = clip(8, batch=3)
    loop = small_loop(renoise=renoise)

    def generate(rows: list[int]) -> Tensor:
        rollout = small_rollout(backbone, seeds=[40 + row for row in rows], loop=loop)
        rollout.prefill(latents[rows, :4], actions[rows, :4])
        return torch.cat(list(rollout.generate(4, actions[rows, 4:])), dim=1)

    together = generate([0, 1, 2])
    torch.testing.assert_close(generate([2, 0]), together[[2, 0]], rtol=0, atol=2e-5)
    torch.testing.assert_close(generate([1]), together[[1]], rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


# -- passes ----------------------------------------------------------------------------------------------------------


class Kinds:
    """The passes that were run, once per pass."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, int, float]] = []

    def on_attend(self, event: AttendEvent) -> None:
        if event.layer == 0:
            context = event.context
            self.passes.append((context.kind.value, context.first_frame, context.timesteps[0]))


def test_passes_come_in_the_loops_order(backbone: Backbone) -> None:
    kinds = Kinds()
    rollout = small_rollout(backbone, recorders=[kinds], loop=small_loop(timesteps=(1000, 400)))
    run(rollout, history=4, generated=4)
    history = [("prefill", 0, 0.0), ("prefill", 2, 0.0)]
    chunks = [[("denoise", at, 1000.0), ("denoise", at, 400.0), ("commit", at, 0.0)] for at in (4, 6)]
    assert kinds.passes == history + chunks[0] + chunks[1]
    assert rollout.next_frame == 8


def test_denoising_without_committing_can_be_repeated(backbone: Backbone) -> None:
    rollout, predictions = small_rollout(backbone), []
    latents, actions = clip(6)
    rollout.prefill(latents[:, :4], actions[:, :4])
    first = rollout.denoise(actions[:, 4:], on_step=predictions.append)
    assert torch.equal(rollout.denoise(actions[:, 4:]), first) and rollout.next_frame == 4
    assert len(predictions) == 4 and torch.equal(predictions[-1], first)
    other = rollout.denoise((actions[:, 4:] + 1) % 5)
    assert (other - first).abs().max() > 1e-2, "actions matter"


def test_a_timer_sees_every_part(backbone: Backbone) -> None:
    class Timer:
        def __init__(self) -> None:
            self.names: list[str] = []

        def measure(self, name: str) -> Any:
            from contextlib import nullcontext

            self.names.append(name)
            return nullcontext()

    rollout = small_rollout(backbone)
    rollout.timer = timer = Timer()
    run(rollout, history=2, generated=4)
    assert timer.names == ["commit", "denoise", "commit", "denoise", "commit"]


# -- bad input -------------------------------------------------------------------------------------------------------


def test_lengths_that_do_not_fit_are_refused_in_one_sentence(backbone: Backbone) -> None:
    rollout = small_rollout(backbone)
    latents, actions = clip(6)
    for frames, better in ((3, 4), (0, 2), (1, 2), (-2, 2)):
        message = f"{frames} frames are not a whole number of 2-frame chunks: ask for {better}"
        with pytest.raises(ValueError, match=message):
            list(rollout.generate(frames, actions))
    with pytest.raises(ValueError, match="5 frames are not a whole number"):
        rollout.prefill(latents[:, :5], actions[:, :5])
    with pytest.raises(ValueError, match="6 frames were asked for and only 5 actions given"):
        list(rollout.generate(6, actions[:, :5]))
    with pytest.raises(ValueError, match="Pass actions exactly when the backbone has them"):
        rollout.step()
    with pytest.raises(ValueError, match=r"actions must be one per frame, \(1, 2\)"):
        rollout.step(actions[:, :3])
    with pytest.raises(ValueError, match=r"latents must be \[batch, frames, 4, h, w\]"):
        rollout.prefill(latents[:, :4, :3], actions[:, :4])
    assert rollout.next_frame == 0 and rollout.state.cache.slots_used() == 0
    assert torch.isfinite(run(rollout)).all(), "and then it goes on"


def test_latents_of_another_size_or_batch_are_refused_and_nothing_is_cached(backbone: Backbone) -> None:
    rollout = small_rollout(backbone)
    latents, actions = clip(2, batch=2)
    with pytest.raises(ValueError, match=re.escape("must be (1, 2, 12, 16)")):
        rollout.prefill(latents, actions)
    with pytest.raises((ValueError, RuntimeError)):
        rollout.prefill(torch.zeros(1, 2, 4, 8, 8), actions[:1])
    assert rollout.next_frame == 0 and rollout.state.cache.slots_used() == 0
    assert torch.isfinite(run(rollout)).all()


def equal_states(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize(
    "cache", [DenseCache, lambda: TempCache(budget_frames=8)], ids=["dense", "tempcache"]
)
def test_nan_stops_the_rollout_and_leaves_the_cache_as_it_was(backbone: Backbone, cache: Any) -> None:
    latents, actions = clip(14)
    rollout, twin = (small_rollout(backbone, cache) for _ in range(2))
    for each in (rollout, twin):
        each.prefill(latents[:, :10], actions[:, :10])
    before = rollout.state_dict()
    broken = latents[:, 10:12].clone()
    broken[0, 1, 2, 3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity in the commit pass of frames 10 to 11"):
        rollout.commit(broken, actions[:, 10:12])
    assert equal_states(rollout.state_dict(), before)

    weight = rollout.transformer.head.head.bias
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("inf")
    with pytest.raises(NonFiniteError):
        list(rollout.generate(4, actions[:, 10:]))
    with torch.no_grad():
        weight.copy_(kept)
    assert equal_states(rollout.state_dict(), before) and rollout.next_frame == 10
    assert torch.equal(rollout.step(actions[:, 10:12]), twin.step(actions[:, 10:12])), (
        "the chunk can be repeated"
    )


@pytest.mark.parametrize("where", ["backbone", "commit"])
def test_an_error_in_mid_pass_leaves_a_rollout_that_goes_on(
    backbone: Backbone, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, twin = small_rollout(backbone), small_rollout(backbone)
    latents, actions = clip(8)
    for each in (rollout, twin):
        each.prefill(latents[:, :4], actions[:, :4])
    before = rollout.state_dict()

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        if where == "backbone":
            patch.setattr(nn.Sequential, "forward", no_memory)
        else:
            patch.setattr(rollout.state.cache, "commit", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            rollout.step(actions[:, 4:6])
    assert equal_states(rollout.state_dict(), before)
    assert torch.equal(rollout.step(actions[:, 4:6]), twin.step(actions[:, 4:6]))


# -- saved states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [DenseCache, lambda: WindowCache(budget_frames=6)], ids=["dense", "window"])
def test_a_rollout_can_be_wound_back(backbone: Backbone, cache: Any) -> None:
    """A state goes into a rollout that has been used, too: the same frames again, or another branch."""
    rollout = small_rollout(backbone, cache)
    _, actions = clip(12)
    run(rollout, history=4, generated=4)
    saved = rollout.state_dict()
    first = list(rollout.generate(4, actions[:, 8:]))
    rollout.load_state_dict(saved)
    assert rollout.next_frame == 8
    again = list(rollout.generate(4, actions[:, 8:]))
    rollout.load_state_dict(saved)
    other = list(rollout.generate(4, (actions[:, 8:] + 1) % 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_state_of_other_seeds_is_refused(backbone: Backbone) -> None:
    saved = small_rollout(backbone, seeds=(1, 2)).state_dict()
    with pytest.raises(ValueError, match=r"has seeds \[1, 2\], this one \[2, 1\]: use the same seeds"):
        small_rollout(backbone, seeds=(2, 1)).load_state_dict(saved)


def test_a_state_with_numpy_seeds_can_be_read_back_without_pickled_code(
    backbone: Backbone, tmp_path: Any
) -> None:
    rollout: Rollout = small_rollout(backbone, seeds=list(np.arange(2)))
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    small_rollout(backbone, seeds=(0, 1)).load_state_dict(
        torch.load(tmp_path / "state.pt", weights_only=True)
    )


def test_history_is_cached_as_prefill_and_latents_of_bfloat16_backbones_stay_float32() -> None:
    backbone = small_backbone()
    backbone.transformer.bfloat16()
    rollout = small_rollout(backbone, DenseCache)
    video = run(rollout)
    assert video.dtype == torch.float32 and video.shape == (1, 6, *LATENT) and torch.isfinite(video).all()
    assert rollout.state.cache.view(0).k.dtype == torch.bfloat16
    assert rollout.loop.commit_pass(0, PassKind.PREFILL).num_frames == CHUNK
