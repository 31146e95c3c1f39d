"""Rollouts of a model in Wan I2V's layout, which reads a prompt and the image that the video starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone, ImageCondition, Prompts
from fastar.backbones.reference import BlockCausalAttend
from fastar.cache import DenseCache
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import Rollout
from tests.small import (
    CHUNK,
    GRID,
    LATENT,
    configs,
    image_backbone,
    make,
    small_backbone,
    small_loop,
    small_rollout,
    uncached,
)

FRAMES, HISTORY, SEEDS = 8, 4, (3, 11)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return image_backbone(text_dim=7, text_len=9)


def world() -> tuple[Tensor, Prompts, ImageCondition]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    image = ImageCondition.of_first_frame(draw(5, 6), draw(FRAMES, *LATENT))
    return draw(FRAMES, *LATENT), Prompts(draw(9, 7), torch.tensor([9, 4])), image


def start(backbone: Backbone, method: Method | None = None, **options: object) -> Rollout:
    _, prompts, image = world()
    exact = Method(name="exact", cache=lambda: DenseCache(storage="float32"))
    given = {"loop": small_loop(), "seeds": SEEDS, "prompts": prompts, "image": image} | options
    return start_rollout(backbone, method or exact, **given)  # type: ignore[arg-type]


@torch.inference_mode()
def test_cached_rollout_equals_the_uncached_forward(backbone: Backbone) -> None:
    latents, prompts, image = world()
    rollout = start(backbone)
    rollout.prefill(latents[:, :HISTORY])
    cached = torch.cat(list(rollout.generate(FRAMES - HISTORY)), dim=1)
    attend = BlockCausalAttend(rope=backbone.transformer.rope, grid=GRID, chunk_frames=CHUNK)
    text = prompts.text("cpu", torch.float32)

    def told(frames: int) -> dict[str, Tensor]:
        return {"text": text, "image": image.tokens, "condition": image.known(0, frames)}

    expected = uncached(backbone, attend, small_loop(), SEEDS, latents[:, :HISTORY], FRAMES - HISTORY, told)
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_a_selector_of_words_leaves_the_image_whole(backbone: Backbone) -> None:
    seen: list[AttendEvent] = []

    class Recorder:
        def on_attend(self, event: AttendEvent) -> None:
            seen.append(event)

    annca = configs("cross_attention")["annca_lsh"]
    start(
        backbone, Method(name="annca", cross_attention=lambda: make(annca)), recorders=[Recorder()]
    ).denoise()
    kept = [e.selection.keep for e in seen if e.stream == "text" and e.selection is not None]
    assert any(keep is not None and not keep.all() for keep in kept)
    images = [e for e in seen if e.stream == "image"]
    assert {e.k.shape[2] for e in images} == {5} and len(images) == len(kept)
    assert len({id(e.k) for e in images}) == 2  # projected once a video and layer


@torch.inference_mode()
def test_the_image_reaches_the_video_through_both_ways(backbone: Backbone) -> None:
    image = world()[2]
    before = start(backbone).denoise()
    for other in (replace(image, tokens=-image.tokens), replace(image, latents=-image.latents)):
        assert (start(backbone, image=other).denoise() - before).abs().max() > 1e-3


def test_images_that_do_not_fit_are_refused(backbone: Backbone) -> None:
    image = world()[2]
    with pytest.raises(
        ValueError, match="starts from an image and none was given: pass an ImageCondition of 2"
    ):
        start(backbone, image=None)
    with pytest.raises(
        ValueError, match=r"tokens \[2, S, 6\] and latents \[2, 8, 8, 4, 6\], got \[2, 5, 7\]"
    ):
        start(backbone, image=replace(image, tokens=torch.zeros(2, 5, 7)))
    with pytest.raises(
        ValueError, match="is of 8 frames and frames 7 to 9 are asked for: encode the image with"
    ):
        image.known(7, 3)
    plain = small_rollout(small_backbone())
    with pytest.raises(ValueError, match="reads no image: leave it out"):
        Rollout(
            plain.transformer,
            state=plain.state,
            loop=plain.loop,
            seeds=(7,),
            latent_shape=LATENT,
            image=image,
        )
