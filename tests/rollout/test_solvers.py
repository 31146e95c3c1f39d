"""UniPC, whose steps look back on those before them: the scheduler's own numbers, also for chunks in flight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastar.backbones import Backbone
from fastar.cache import EmptyCache
from fastar.rollout import solvers
from fastar.rollout.flight import InFlight
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.protocols import lockstep_b
from fastar.rollout.schedules import uniform_timesteps
from tests.rollout.loops import CHUNK, LOOPS, actions, generated, started
from tests.small import small_backbone

UNIPC: Any = replace(LOOPS["diffusion_forcing"], solver="unipc")
SHAPE = (2, 3, 4, 2, 3)


def loop_of(steps: int, solver: str = "unipc", shift: float = 8.0) -> ChunkLoop:
    return ChunkLoop(chunk_frames=3, timesteps=uniform_timesteps(steps, shift=shift), solver=solver)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def bent(x: Tensor, timestep: float) -> Tensor:
    """A velocity that depends on the place and the level."""
    return torch.sin(3 * x) + x.flip(-1) * (timestep / 1000 - 0.3)


def flown(loop: ChunkLoop, start: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    chunk = InFlight(0, 0, start)
    for timestep in loop.timesteps:
        chunk, clean = chunk.after(velocity(chunk.latents, timestep), loop, [0, 1])
    assert torch.equal(chunk.latents, clean) and not chunk.past
    return clean


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_a_chunk_moves_as_by_diffusers_scheduler(steps: int) -> None:
    """One scheduler for one sample, as the published pipeline has one for each frame."""
    diffusers = pytest.importorskip("diffusers")
    loop = loop_of(steps)
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8
    )
    theirs.set_timesteps(sigmas=1 - np.arange(steps) / steps)
    x = drawn(0)
    for index, timestep in enumerate(loop.timesteps):
        assert theirs.sigmas[index] == pytest.approx(timestep / 1000, abs=2e-6)
        x = theirs.step(bent(x, timestep), theirs.timesteps[index], x).prev_sample
    torch.testing.assert_close(flown(loop, drawn(0), bent), x, rtol=1e-5, atol=1e-5)
    if steps > 2:  # with one step before it there is nothing to look back on
        assert (flown(loop_of(steps, "euler"), drawn(0), bent) - x).abs().max() > 1e-2


def test_it_ends_nearer_to_where_the_flow_leads_than_euler() -> None:
    """Of data that are normal (mean 2, deviation 0.3) velocity and end are known: from noise z to 2 + 0.3 z."""
    pytest.importorskip("diffusers")

    def velocity(x: Tensor, timestep: float) -> Tensor:
        sigma = timestep / 1000
        variance = (0.3 * (1 - sigma)) ** 2 + sigma**2
        slope = (sigma - 0.09 * (1 - sigma)) / variance  # of E[noise - clean | x] in x
        return slope * (x - 2 * (1 - sigma)) - 2

    wanted = 2 + 0.3 * drawn(0)
    unipc, euler = (
        (flown(loop_of(20, solver, shift=1.0), drawn(0), velocity) - wanted).abs().max()
        for solver in ("unipc", "euler")
    )
    assert unipc < 0.1 * euler < 0.01


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("diffusers")
    return small_backbone()


def test_chunks_in_flight_each_look_back_on_their_own_steps(backbone: Backbone) -> None:
    """Of a model that sees no other chunk (an empty cache, causal), all are as they would be alone: dense's are not."""
    frames = 12
    alone = ChunkLoop(chunk_frames=CHUNK, timesteps=UNIPC.timesteps, solver="unipc")
    both = [
        generated(started(backbone, loop, EmptyCache, end_frame=frames), frames)
        for loop in (replace(UNIPC, stagger=len(UNIPC.timesteps)), alone)
    ]
    assert torch.equal(*both)
    euler, unipc = (
        generated(started(backbone, loop, end_frame=frames), frames)
        for loop in (LOOPS["diffusion_forcing"], UNIPC)
    )
    assert (euler - unipc).abs().max() > 1e-2


def test_saved_with_chunks_in_flight_and_resumed_to_the_same_bits(backbone: Backbone, tmp_path: Any) -> None:
    frames = 18
    rollout = started(backbone, UNIPC, end_frame=frames)
    for first in (0, CHUNK):
        rollout.step(actions(frames)[:, first : first + UNIPC.frames_in_flight])
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [(chunk["step"], len(chunk["past"])) for chunk in saved["in_flight"]] == [(4, 3), (2, 3)]
    wanted = generated(rollout, frames)
    fresh = started(backbone, UNIPC, end_frame=frames)
    for resumed in (fresh, rollout):
        resumed.load_state_dict(saved)
        assert torch.equal(generated(resumed, frames), wanted)
    for chunk in saved["in_flight"]:
        chunk["past"] = chunk["past"][:1] + [tensor + 1 for tensor in chunk["past"][1:]]
    fresh.load_state_dict(saved)
    assert (generated(fresh, frames) - wanted).abs().max() > 1e-2, "what is looked back on matters"


def test_dense_reproduces_its_trajectory(backbone: Backbone) -> None:
    """Chunks are denoised twice from where the last commit left them; the second time is the same as the first."""
    frames = 12
    video = generated(started(backbone, UNIPC, end_frame=frames), frames)
    rollout = started(backbone, UNIPC, end_frame=frames)
    for first, chunk in lockstep_b(rollout, video, actions(frames), 0):
        assert torch.equal(chunk, video[:, first : first + CHUNK])
        assert torch.equal(rollout.denoise(actions(frames)[:, first:]), chunk)


def test_solvers_that_cannot_be_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown solver 'heun': choose one of euler, unipc"):
        loop_of(3, "heun")
    with pytest.raises(
        ValueError, match="solver=unipc looks back on steps that fresh noise leaves behind: set"
    ):
        replace(LOOPS["self_forcing"], solver="unipc")
    solvers._scheduler.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"unipc is diffusers' UniPCMultistepScheduler \(.*\): pip install"):
        flown(loop_of(3), drawn(0), bent)
