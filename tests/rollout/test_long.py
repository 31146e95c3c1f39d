"""Beyond the 1,024 frames of Wan's published position table, and beyond the frames a model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastar.backbones import Backbone
from fastar.backbones.reference import BlockCausalAttend
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from tests.small import CHANNELS, clip, poses, small_backbone, small_loop, small_rollout, uncached

HISTORY, CHUNK, GENERATED = 1000, 20, 60


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Of one token a frame, so that a thousand of them are nothing."""
    made = small_backbone()
    return replace(made, config=replace(made.config, frame_size=(16, 16)))


@torch.inference_mode()
def test_a_rollout_across_frame_1024_equals_the_uncached_forward(backbone: Backbone) -> None:
    latents, actions = (x[..., :2, :2] if x.dim() == 5 else x for x in clip(HISTORY + GENERATED))
    loop = small_loop(chunk_frames=CHUNK)
    rollout = small_rollout(backbone, loop=loop)
    rollout.prefill(latents[:, :HISTORY], actions[:, :HISTORY])
    cached = torch.cat(list(rollout.generate(GENERATED, actions[:, HISTORY:])), dim=1)
    attend = BlockCausalAttend(rope=backbone.transformer.rope, grid=(1, 1), chunk_frames=CHUNK)
    told = {"actions": actions, "poses": poses(backbone, actions)}
    expected = uncached(
        backbone,
        attend,
        loop,
        rollout.seeds,
        latents[:, :HISTORY],
        GENERATED,
        lambda frames: {name: value[:, :frames] for name, value in told.items()},
    )
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    "cache",
    [DenseCache, lambda: WindowCache(budget_frames=60), lambda: TempCache(budget_frames=60)],
    ids=["dense", "window", "tempcache"],
)
@torch.inference_mode()
def test_no_cache_fails_far_beyond_the_frames_of_training(
    backbone: Backbone, cache: Callable[[], CachePolicy]
) -> None:
    latents, actions = (x[..., :2, :2] if x.dim() == 5 else x for x in clip(1040))
    assert backbone.config.context_frames == 8
    rollout = small_rollout(backbone, cache, loop=small_loop(chunk_frames=CHUNK))
    rollout.prefill(latents, actions)
    assert rollout.step(actions[:, :CHUNK]).shape == (1, CHUNK, CHANNELS, 2, 2)
