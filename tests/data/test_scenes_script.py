"""Scripts of scenes: fixed by their number, made of the right pairs, refused if they make no sense."""

import hashlib
from itertools import pairwise

import pytest

from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.script import (
    HELD_OUT,
    LENGTHS,
    Actor,
    Background,
    Camera,
    Motion,
    Script,
    Shot,
    draw_script,
    motions_of,
)
from fastar.data.scenes.sprites import ATLAS, SIZES, boxes, masks, sprites

WALL = Background("checks", ("red", "blue"))


def test_a_script_is_a_function_of_seed_split_and_number() -> None:
    first = draw_script(7, seed=3, split="train", frames=96)
    again = draw_script(7, seed=3, split="train", frames=96)
    assert first == again and first.wording == again.wording
    others = [
        draw_script(8, seed=3, split="train", frames=96),
        draw_script(7, seed=4, split="train", frames=96),
        draw_script(7, seed=3, split="heldout", frames=96),
    ]
    assert first not in others


def test_a_fifth_of_the_pairs_is_held_out_of_every_noun_and_motion() -> None:
    assert len(NOUNS) == 64 and len(HELD_OUT) == 90
    for split in ("train", "heldout"):
        assert all(motions_of(noun, split) for noun in NOUNS)
        assert {motion for noun in NOUNS for motion in motions_of(noun, split)} == set(Motion)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scripts_keep_to_their_pairs_and_to_their_form(split: str) -> None:
    came_back = 0
    for index in range(60):
        script = draw_script(index, split=split, frames=96)  # type: ignore[arg-type]
        actors = [actor for shot in script.shots for actor in shot.actors]
        assert all(((a.noun, a.motion) in HELD_OUT) == (split == "heldout") for a in actors)
        assert script.frames == 96 and 5 <= len(script.shots) <= 8
        assert len({(a.noun, a.size) for a in actors}) == len({a.noun for a in actors}) <= 5
        walls = [shot.background for shot in script.shots]
        assert 2 <= len(set(walls)) <= 3
        assert all(wall != other for wall, other in pairwise(walls))
        shows = [
            "".join("x" if noun in {a.noun for a in s.actors} else " " for s in script.shots)
            for noun in NOUNS
        ]
        came_back += any("x x" in show or "x  x" in show for show in shows)
    assert came_back > 40


@pytest.mark.parametrize("frames", range(12, 193, 4))
def test_shots_add_up_to_every_length(frames: int) -> None:
    lengths = [shot.length for shot in draw_script(frames, frames=frames).shots]
    assert sum(lengths) == frames and set(lengths) <= set(LENGTHS) and len(lengths) <= 8


def test_what_comes_in_starts_outside_and_slow_is_half_as_fast() -> None:
    entering = Actor("owl", "small", (1, 0), Motion.FROM_LEFT)
    assert entering.corner(0, Camera.STILL) == (-26, 35) and entering.corner(5, Camera.STILL) == (-16, 35)
    assert entering.corner(5, Camera.LEFT) == (-11, 35)
    moving, slow = (Actor("owl", "large", (0, 1), Motion.DOWN, slow) for slow in (False, True))
    assert moving.corner(4, Camera.STILL) == (45, 9) and slow.corner(4, Camera.STILL) == (45, 5)
    assert Actor("owl", "large", (0, 1)).corner(4, Camera.RIGHT) == (41, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw_script(0, frames=98), "multiple of 4 from 12 to 192, not 98"),
        (lambda: draw_script(0, frames=196), "multiple of 4 from 12 to 192, not 196"),
        (lambda: draw_script(0, split="test"), "train or heldout, not 'test'"),  # type: ignore[arg-type]
        (lambda: Background("tartan", ("red", "blue")), "unknown pattern 'tartan'"),
        (lambda: Background("dots", ("red", "red")), "two different colours"),
        (lambda: Actor("lemon", "small", (0, 0)), "no picture of 'lemon'"),
        (lambda: Actor("owl", "huge", (0, 0)), "unknown size 'huge'"),
        (lambda: Actor("owl", "small", (0, 3)), "from 0 to 2"),
        (lambda: Actor("owl", "small", (0, 1), Motion.FROM_LEFT), "place in that column"),
        (lambda: Actor("owl", "small", (0, 1), Motion.STAY, slow=True), "can be slow"),
        (lambda: Shot(13, WALL, Camera.STILL, (Actor("owl", "small", (0, 1)),)), "not 13"),
        (lambda: Shot(12, WALL, Camera.STILL, ()), "1 to 3 actors, not 0"),
        (
            lambda: Shot(
                12, WALL, Camera.STILL, (Actor("owl", "small", (0, 1)), Actor("owl", "small", (0, 2)))
            ),
            "different nouns",
        ),
        (
            lambda: Shot(
                12, WALL, Camera.STILL, (Actor("owl", "small", (0, 1)), Actor("pig", "small", (0, 1)))
            ),
            "different places",
        ),
        (lambda: Script(()), "1 to 8 shots, not 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(("size", "digest"), [("small", "8d4431c8f1a61489"), ("large", "fc610f11dd127700")])
def test_sprites_are_scaled_to_the_same_pixels_everywhere(size: str, digest: str) -> None:
    """A model trained on other pixels, or a detector that knows others, would be off."""
    assert hashlib.sha256(sprites(size).numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("size", SIZES)
def test_sprites_fill_their_cells(size: str) -> None:
    side = SIZES[size]
    assert sprites(size).shape == (64, side, side, 4) and ATLAS.stat().st_size < 450e3
    box = boxes(size)
    assert ((box[:, 2:] - box[:, :2]).amax(1) >= side - 2).all() and (box >= 0).all() and (box <= side).all()
    assert (masks(size).sum((1, 2)) > 0.2 * side * side).all()
