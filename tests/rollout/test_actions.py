"""Rollouts of a model in Matrix-Game's layout: image and actions reach it, the past of its actions is kept rightly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.attention.actions import ActionStreams
from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.backbones import ActionModuleConfig, Backbone, ImageCondition
from fastar.backbones.reference import BlockCausalAttend
from fastar.backbones.wan.actions import action_windows
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from fastar.engines.training import TeacherForcingAttend
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.protocols import TeeCache, lockstep_a
from fastar.rollout.rollout import Rollout
from tests.small import CHUNK, GRID, LATENT, TOKENS, image_backbone, small_loop, uncached

FRAMES, WINDOW = 12, 5  # the window is no whole number of chunks
MODULE = ActionModuleConfig(
    layers=1,
    keyboard_dim=3,
    key_embedding=8,
    num_heads=2,
    head_dim=16,
    rope_dims=(8, 4, 4),
    attention_frames=WINDOW,
)
EXACT: Callable[[], CachePolicy] = lambda: DenseCache(storage="float32")  # noqa: E731


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return image_backbone(action_module=MODULE)


def world(batch: int = 2) -> tuple[Tensor, Tensor, ImageCondition]:
    """True latents, windows of actions and the image of videos of `FRAMES` frames."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    pixel_frames = 4 * FRAMES - 3
    actions = action_windows(
        MODULE, mouse=draw(pixel_frames, 2), keyboard=draw(pixel_frames, 3).gt(0).float(), num_frames=FRAMES
    )
    image = ImageCondition.of_first_frame(draw(5, 6), draw(FRAMES, *LATENT))
    return draw(FRAMES, *LATENT), actions, image


def start(backbone: Backbone, cache: Callable[[], CachePolicy] = EXACT, **options: Any) -> Rollout:
    method = Method(name="small", cache=cache)
    options = {"image": world()[2], "seeds": (3, 11), "loop": small_loop()} | options
    return start_rollout(backbone, method, **options)


def played(rollout: Rollout, history: int = 4) -> Tensor:
    latents, actions, _ = world()
    rollout.prefill(latents[:, :history], actions[:, :history])
    return torch.cat(list(rollout.generate(FRAMES - history, actions[:, history:])), dim=1)


@torch.inference_mode()
def test_cached_rollout_equals_the_uncached_forward(backbone: Backbone) -> None:
    (latents, actions, image), model = world(), backbone.transformer
    attend = BlockCausalAttend(
        rope=model.rope, grid=GRID, chunk_frames=CHUNK, action_rope=model.action_rope, action_frames=WINDOW
    )

    def told(frames: int) -> dict[str, Tensor]:
        return {"actions": actions[:, :frames], "image": image.tokens, "condition": image.known(0, frames)}

    expected = uncached(backbone, attend, small_loop(), (3, 11), latents[:, :4], FRAMES - 4, told)
    torch.testing.assert_close(played(start(backbone)), expected, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_mouse_keys_image_and_known_frames_matter(backbone: Backbone) -> None:
    latents, actions, image = world()

    def first_chunk(actions: Tensor = actions, image: ImageCondition = image) -> Tensor:
        rollout = start(backbone, image=image)
        rollout.prefill(latents[:, :4], actions[:, :4])
        return rollout.denoise(actions[:, 4:6])

    before = first_chunk()
    for changed in (actions * torch.tensor([1.0, 0, 1, 1, 1]), actions * torch.tensor([1.0, 1, 1, 0, 1])):
        assert (first_chunk(changed) - before).abs().max() > 1e-3
    earlier = actions.clone()
    earlier[:, 3] = 0  # of a committed frame that the window reaches
    assert (first_chunk(earlier) - before).abs().max() > 1e-4
    for other in (replace(image, tokens=-image.tokens), replace(image, latents=-image.latents)):
        assert (first_chunk(image=other) - before).abs().max() > 1e-3
    assert image.latents[:, 0, :4].eq(1).all() and image.latents[:, 1:, :4].eq(0).all()


@pytest.mark.parametrize(
    "cache", [EXACT, lambda: WindowCache(budget_frames=6), lambda: TempCache(budget_frames=6)]
)
@torch.inference_mode()
def test_saved_and_resumed_gives_the_same_bits(backbone: Backbone, cache: Callable[[], CachePolicy]) -> None:
    _, actions, _ = world()
    whole = played(start(backbone, cache))
    first = start(backbone, cache)
    latents = world()[0]
    first.prefill(latents[:, :4], actions[:, :4])
    parts = [first.step(actions[:, 4:6]), first.step(actions[:, 6:8])]
    second = start(backbone, cache)
    second.load_state_dict(first.state_dict())
    parts += list(second.generate(FRAMES - 8, actions[:, 8:]))
    assert torch.equal(torch.cat(parts, dim=1), whole)


@torch.inference_mode()
def test_the_window_stops_growing_and_denoising_or_a_failed_pass_leaves_no_trace(backbone: Backbone) -> None:
    latents, actions, _ = world()
    seen: list[AttendEvent] = []

    class Recorder:
        def on_attend(self, event: AttendEvent) -> None:
            seen.append(event)

    rollout = start(backbone, recorders=[Recorder()])
    rollout.prefill(latents[:, :8], actions[:, :8])
    shapes = {(e.stream, tuple(e.q.shape), tuple(e.k.shape)) for e in seen if e.context.first_frame == 6}
    assert ("mouse", (2 * TOKENS, 2, CHUNK, 16), (2 * TOKENS, 2, WINDOW, 16)) in shapes
    assert ("keyboard", (2, 2, CHUNK * TOKENS, 16), (2, 2, WINDOW, 16)) in shapes
    streams = rollout.state.actions
    assert streams is not None
    before = streams.state_dict()
    assert {key: tuple(t.shape) for key, t in before["kept"].items()} == {
        ("mouse", 0): (2, 2 * TOKENS, 2, WINDOW, 16),
        ("keyboard", 0): (2, 2, 2, WINDOW, 16),
    }
    rollout.denoise(actions[:, 8:10])
    with pytest.raises(ValueError, match="actions must be one per frame"):
        rollout.commit(latents[:, 8:10], actions[:, 8:9])
    after = streams.state_dict()
    assert before["next_frame"] == after["next_frame"] == 8
    assert all(torch.equal(t, after["kept"][key]) for key, t in before["kept"].items())


@torch.inference_mode()
def test_rewritten_frames_are_as_if_they_had_been_so_at_first(backbone: Backbone) -> None:
    latents, actions, _ = world()
    changed, straight = start(backbone), start(backbone)
    other = -latents[:, 6:8]
    changed.prefill(latents[:, :8], actions[:, :8])
    changed.state.rewrite(6)
    changed.next_frame = 6
    changed.commit(other, actions[:, 6:8], kind=PassKind.REWRITE)
    straight.prefill(torch.cat([latents[:, :6], other], dim=1), actions[:, :8])
    chunks = [rollout.denoise(actions[:, 8:10]) for rollout in (changed, straight)]
    torch.testing.assert_close(chunks[0], chunks[1], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_in_protocol_a_the_past_of_actions_is_the_teachers(backbone: Backbone) -> None:
    latents, actions, _ = world()
    follower = EXACT()
    teacher = start(backbone, lambda: TeeCache(EXACT(), [follower]))
    student = start(backbone, lambda: follower)
    chunks = lockstep_a(teacher, {"small": student}, latents, actions, 4)
    alone = start(backbone)
    alone.prefill(latents[:, :4], actions[:, :4])
    for first, _, chunk in chunks:
        part = slice(first, first + CHUNK)
        torch.testing.assert_close(chunk, alone.denoise(actions[:, part]), rtol=0, atol=1e-5)
        alone.commit(latents[:, part], actions[:, part])


def test_a_pass_that_leaves_a_gap_or_a_stream_out_is_refused() -> None:
    streams = ActionStreams(rope=None, frames=4)  # type: ignore[arg-type]  # not reached
    with pytest.raises(ValueError, match="hold the frames before 0 and the pass begins at 2"):
        streams.begin_pass(small_loop().commit_pass(2))
    streams.replace({("mouse", 0): torch.zeros(2, 1, 1, 2, 4)}, 2)
    with pytest.raises(ValueError, match=r"every action stream of every layer; missing: \[\('mouse', 0\)\]"):
        streams.following()


@torch.inference_mode()
def test_in_bfloat16_it_does_what_it_does_in_float32(backbone: Backbone) -> None:
    latents, actions, _ = world()
    half = image_backbone(action_module=MODULE, numerics="self_forcing")
    half.transformer.bfloat16()
    chunks = []
    for one in (backbone, half):
        rollout = start(one)
        rollout.prefill(latents[:, :4], actions[:, :4])
        chunks.append(rollout.denoise(actions[:, 4:6]))
    difference = (chunks[0] - chunks[1]).square().mean().sqrt()
    assert 1e-4 < difference < 0.05 * chunks[0].square().mean().sqrt()


def test_training_and_references_without_its_rotation_are_refused(backbone: Backbone) -> None:
    rope, calls = backbone.transformer.rope, torch.zeros(3, 1, 2, CHUNK, 16)
    teacher = TeacherForcingAttend(
        rope, grid=GRID, num_frames=2, chunk_frames=CHUNK, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="action module cannot be trained"):
        teacher("mouse", 0, *calls)
    with pytest.raises(ValueError, match="pass action_rope"):
        BlockCausalAttend(rope=rope, grid=GRID, chunk_frames=CHUNK)("keyboard", 0, *calls)
    state = start(backbone).state
    state.actions = None
    state.begin_pass(small_loop().commit_pass(0))
    with pytest.raises(RuntimeError, match="mouse stream needs a state with actions"):
        state.attend("mouse", 0, *calls)
