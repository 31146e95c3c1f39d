"""Classifier-free guidance: each pass with the prompt and with a negative one, each of which has a past of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.backbones import Backbone, Prompts
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from fastar.rollout import capture
from fastar.rollout.flight import InFlight
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.noise import chunk_noise
from fastar.rollout.rollout import Rollout
from tests.rollout.loops import CHUNK, LOOPS, exact
from tests.rollout.test_capture import OnCpu
from tests.small import text_backbone

SEEDS = (3, 8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return text_backbone()


def words(seed: int, batch: int = 2) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return Prompts(torch.randn(batch, 9, 48, generator=generator), torch.full((batch,), 7 - seed))


def started(
    backbone: Backbone, loop: ChunkLoop, cache: Callable[[], CachePolicy] = exact, **options: Any
) -> Rollout:
    given = {"seeds": SEEDS, "prompts": words(0), "negative": words(1, batch=1)} | options
    return start_rollout(backbone, Method(name="test", cache=cache), loop=loop, **given)


def made(rollout: Rollout, frames: int) -> Tensor:
    return torch.cat([chunk.cpu() for chunk in rollout.generate(frames)], dim=1)


@torch.inference_mode()
def test_it_is_two_rollouts_whose_velocities_are_mixed(backbone: Backbone) -> None:
    """Each commits the same clean chunks, and sees its own keys of them."""
    plain = LOOPS["self_forcing"]
    loop, frames = replace(plain, guidance=3.0), 3 * CHUNK
    found = made(started(backbone, loop), frames)
    away = Prompts(*(x.expand(2, *x.shape[1:]) for x in (words(1, 1).embeddings, words(1, 1).lengths)))
    two = [started(backbone, plain, prompts=p, negative=None) for p in (words(0), away)]
    for first in range(0, frames, CHUNK):
        noise = chunk_noise(SEEDS, first, 0, (CHUNK, *two[0].latent_shape), "cpu")
        chunk = InFlight(first, 0, noise)
        for context in plain.denoise_passes(first):
            towards, from_there = (each.run_pass(context, chunk.latents, None) for each in two)
            chunk, _ = chunk.after(from_there + 3 * (towards - from_there), plain, SEEDS)
        torch.testing.assert_close(found[:, first : first + CHUNK], chunk.latents, rtol=1e-4, atol=1e-4)
        for each in two:
            each.commit(chunk.latents)
    assert (made(two[0], CHUNK) - made(two[1], CHUNK)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["self_forcing", "rolling_forcing", "diffusion_forcing"])
def test_guidance_of_one_is_the_prompt_alone(backbone: Backbone, name: str) -> None:
    """With chunks in flight, too; of two, it is another video."""
    loop, frames = LOOPS[name], 5 * CHUNK
    alone = made(started(backbone, loop, negative=None, end_frame=frames), frames)
    one = made(started(backbone, replace(loop, guidance=1.0), end_frame=frames), frames)
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)
    two = made(started(backbone, replace(loop, guidance=2.0), end_frame=frames), frames)
    assert (two - alone).abs().max() > 1e-2


@pytest.mark.parametrize(
    "cache", [exact, partial(WindowCache, budget_frames=6), partial(TempCache, budget_frames=6)]
)
def test_saved_and_resumed_gives_the_same_bits(backbone: Backbone, cache: Callable[[], CachePolicy]) -> None:
    loop, frames = replace(LOOPS["diffusion_forcing"], guidance=4.0), 6 * CHUNK
    rollout = started(backbone, loop, cache, end_frame=frames)
    for _ in range(2):
        rollout.step()
    fresh = started(backbone, loop, cache, end_frame=frames)
    fresh.load_state_dict(rollout.state_dict())
    assert torch.equal(made(fresh, frames - 6), made(rollout, frames - 6))


@torch.inference_mode()
def test_captured_passes_are_guided_too(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(capture, "Graphs", OnCpu)
    backbone, loop = text_backbone(), replace(LOOPS["self_forcing"], guidance=3.0)
    backbone.transformer.to(device)
    window = partial(WindowCache, budget_frames=14, storage="float32")
    plain, captured = (made(started(backbone, loop, window, capture=c), 8 * CHUNK) for c in (False, True))
    torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-4)


def test_both_caches_count(backbone: Backbone) -> None:
    loop = LOOPS["self_forcing"]
    both, one = started(backbone, replace(loop, guidance=2.0)), started(backbone, loop, negative=None)
    for rollout in (both, one):
        rollout.step()
    more = 2 * 2 * 2 * 64 * CHUNK * 24 * 4  # keys and values of two videos and layers; positions are shared
    assert both.state.cache.bytes_used() - one.state.cache.bytes_used() == more
    assert isinstance(both.state.cache, DenseCache) and both.state.cache.spec.batch == 4


def test_prompts_may_change_and_what_does_not_fit_is_refused(backbone: Backbone) -> None:
    loop = replace(LOOPS["longlive"], guidance=2.0)
    rollout = started(backbone, loop)
    chunk = rollout.step()
    rollout.change_prompts(words(2), chunk)
    assert rollout.next_frame == CHUNK and torch.isfinite(rollout.step()).all()
    with pytest.raises(ValueError, match="pass one, an empty one will do"):
        started(backbone, loop, negative=None)
    with pytest.raises(
        ValueError, match=r"has no guidance: leave the negative prompt out, or set rollout\.guidance"
    ):
        started(backbone, LOOPS["longlive"])
    with pytest.raises(ValueError, match=r"must be \[1 or 2, tokens, 48\], got \[3, 9, 48\]"):
        started(backbone, loop, negative=words(1, batch=3))
    with pytest.raises(ValueError, match="guidance must not be negative, got -1"):
        replace(loop, guidance=-1)
