"""The renderer against one that is slow and plain, and what the truth says against its pixels."""

import math

import numpy as np
import pytest
import torch

from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.render import PALETTE, render, truth
from fastar.data.scenes.script import (
    PANS,
    PATTERNS,
    Actor,
    Background,
    Camera,
    Motion,
    Script,
    Shot,
    draw_script,
)
from fastar.data.scenes.sprites import SIZES, masks, sprites


def shows_second_colour(pattern: str, x: int, y: int) -> bool:
    wave = round(4 * math.sin(2 * math.pi * (x % 32) / 32))
    return {
        "plain": y >= 72,
        "level stripes": (y // 12) % 2 == 1,
        "upright stripes": (x // 12) % 2 == 1,
        "checks": (x // 16 + y // 16) % 2 == 1,
        "dots": (x % 24 - 12) ** 2 + (y % 24 - 12) ** 2 <= 49,
        "waves": ((y + wave) // 12) % 2 == 1,
    }[pattern]


def slow_background(shot: Shot, phase: int) -> np.ndarray:
    image = np.zeros((96, 128, 3), np.uint8)
    for y in range(96):
        for x in range(128):
            second = shows_second_colour(shot.background.pattern, x + PANS[shot.camera] * phase, y)
            image[y, x] = PALETTE[shot.background.colours[second]]
    return image


def slow_frame(shot: Shot, phase: int) -> tuple[np.ndarray, np.ndarray]:
    """The frame pixel by pixel, and which actor owns each."""
    image, owner = slow_background(shot, phase), np.full((96, 128), -1)
    for number, actor in enumerate(shot.actors):
        left, top = actor.corner(phase, shot.camera)
        noun = NOUNS.index(actor.noun)
        sprite, mask = sprites(actor.size)[noun].numpy().astype(int), masks(actor.size)[noun]
        for i in range(SIZES[actor.size]):
            for j in range(SIZES[actor.size]):
                y, x = top + i, left + j
                if 0 <= y < 96 and 0 <= x < 128:
                    alpha = sprite[i, j, 3]
                    image[y, x] = (
                        alpha * sprite[i, j, :3] + (255 - alpha) * image[y, x].astype(int) + 127
                    ) // 255
                    if mask[i, j]:
                        owner[y, x] = number
    return image, owner


def one_shot(pattern: str, camera: Camera, *actors: Actor) -> Script:
    return Script((Shot(12, Background(pattern, ("green", "purple")), camera, actors),))


ACTORS = (
    Actor("owl", "large", (0, 2), Motion.RIGHT),
    Actor("bicycle", "small", (1, 2), Motion.UP, slow=True),
    Actor("castle", "large", (2, 0), Motion.FROM_LEFT),
)


@pytest.mark.parametrize("camera", Camera)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_frames_and_visible_shares_equal_those_drawn_pixel_by_pixel(pattern: str, camera: Camera) -> None:
    script = one_shot(pattern, camera, *ACTORS)
    frames, found = render(script), truth(script)
    assert frames.shape == (12, 96, 128, 3) and frames.dtype == torch.uint8
    for phase in (0, 11):
        image, owner = slow_frame(script.shots[0], phase)
        assert np.array_equal(frames[phase].numpy(), image)
        for number, actor in enumerate(ACTORS):
            pixels = int(masks(actor.size)[NOUNS.index(actor.noun)].sum())
            assert found.visible[phase, number].item() == pytest.approx((owner == number).sum() / pixels)


def test_later_actors_hide_earlier_ones() -> None:
    first, second = Actor("apple", "large", (1, 1)), Actor("pizza", "large", (0, 1), Motion.DOWN)
    hidden = truth(one_shot("plain", Camera.STILL, first, second)).visible[11]
    turned = truth(one_shot("plain", Camera.STILL, second, first)).visible[11]
    assert hidden[0] < 0.7 and hidden[1] == 1 and turned[0] < 0.7 and turned[1] == 1


@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.noun)
def test_boxes_hold_all_that_differs_from_the_background(actor: Actor) -> None:
    script = one_shot("dots", Camera.RIGHT, actor)
    for phase in (0, 6, 11):
        x0, y0, x1, y1 = truth(script).boxes[phase, 0].tolist()
        assert SIZES[actor.size] - 2 <= max(x1 - x0, y1 - y0) <= SIZES[actor.size]
        change = render(script)[phase].int() - torch.from_numpy(slow_background(script.shots[0], phase)).int()
        rows, columns = (change.abs().amax(-1) > 60).nonzero().unbind(1)
        assert (len(rows) > 0) == (truth(script).visible[phase, 0] > 0)
        if len(rows):
            # edges that are hardly opaque are not in the box
            assert y0 - 1 <= rows.min() and rows.max() <= y1
            assert x0 - 1 <= columns.min() and columns.max() <= x1
        if x0 >= 0 and x1 <= 128 and y0 >= 0 and y1 <= 96:
            assert rows.min() <= y0 + 2 and rows.max() >= y1 - 3
            assert columns.min() <= x0 + 2 and columns.max() >= x1 - 3


def test_truth_and_frames_of_a_drawn_script_belong_together() -> None:
    script = draw_script(4, split="heldout", frames=96)
    found = truth(script)
    assert torch.equal(render(script), render(draw_script(4, split="heldout", frames=96)))
    assert found.boxes.shape == (96, 3, 4) and found.visible.shape == (96, 3)
    assert [tuple(pair) for pair in torch.stack([found.shot, found.phase], 1).tolist()] == script.timecode()
    actors = torch.tensor([len(shot.actors) for shot in script.shots])[found.shot]
    assert torch.equal((found.nouns >= 0).sum(1), actors)
    assert not found.visible[found.nouns < 0].any() and found.visible.max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_frames_are_the_same_bits_on_a_gpu() -> None:
    script = draw_script(1, frames=96)
    assert torch.equal(render(script, "cuda").cpu(), render(script))
