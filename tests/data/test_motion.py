"""True motion on the grid of tokens: Doom's from pose and depth, scenes' from their scripts."""

from __future__ import annotations

import torch

from fastar.data.doom.camera import EYE, HEIGHT, WIDTH
from fastar.data.doom.motion import DoomMotion
from fastar.data.doom.raycast import FOCAL_X
from fastar.data.motion import token_centres, tokens_at
from fastar.data.scenes.motion import ScenesMotion
from fastar.data.scenes.script import Actor, Background, Camera, Motion, Script, Shot

GRID = (6, 8)
OWN = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij"), -1).reshape(-1, 2)


def wall(*poses: tuple[float, float]) -> DoomMotion:
    """A camera before a flat wall 320 units away, at (forward, left) positions; all of the picture is that wall."""
    pose = torch.tensor([[x, y, EYE, 0.0] for x, y in poses])
    depth = torch.stack([torch.full((HEIGHT, WIDTH), 320.0 - x) for x, _ in poses])
    return DoomMotion(pose, depth, GRID)


def test_centres_lie_in_their_tokens() -> None:
    centres = token_centres(GRID, (96, 128))
    assert centres[0].tolist() == [8, 8] and (tokens_at(centres, GRID, (96, 128)) == OWN).all()


def test_a_camera_that_stands_still_sees_everything_where_it_was() -> None:
    places, visible = wall((0, 0), (0, 0), (0, 0)).locate(2, [0, 1])
    assert visible.all() and (places == OWN).all()


def test_a_step_to_the_side_moves_a_wall_by_its_parallax() -> None:
    columns = 2
    side = columns * (WIDTH / GRID[1]) * 320 / FOCAL_X  # map units that shift the picture by two tokens
    places, visible = wall((0, 0), (0, side)).locate(1, [0])
    # from further left, the wall has moved to the right: it was two columns further left
    assert (places[0] == OWN - torch.tensor([0, columns]))[visible[0]].all()
    assert (visible[0] == (OWN[:, 1] >= columns)).all()


def test_what_was_hidden_is_not_visible() -> None:
    motion = wall((0, 0), (0, 0))
    motion.depth[0] = 100.0  # something stood before the wall
    assert not motion.locate(1, [0])[1].any()


def test_floor_and_walls_are_told_apart() -> None:
    motion = wall((0, 0))
    assert (motion.region(0) == 1).view(GRID)[:4].all()
    slopes = (HEIGHT / 2 - torch.arange(HEIGHT) - 0.5) / (1.2 * FOCAL_X)
    motion.depth[0] = torch.where(slopes < 0, EYE / -slopes, 320.0)[:, None].expand(HEIGHT, WIDTH)
    assert (motion.region(0).view(GRID)[3:] == 0).all() and (motion.region(0).view(GRID)[:3] == 1).all()


def scene(motion: Motion, camera: Camera, *, shots: int = 1) -> ScenesMotion:
    actor = Actor("apple", "large", (1, 1), motion)
    shot = Shot(16, Background("dots", ("red", "blue")), camera, (actor,))
    return ScenesMotion(Script((shot,) * shots), GRID)


def test_a_thing_moves_and_the_background_stays() -> None:
    motion = scene(Motion.RIGHT, Camera.STILL)
    thing = motion.region(8) == 1
    assert 2 <= thing.sum().item() <= 16
    places, visible = motion.locate(8, [0])
    assert (
        places[0, thing] == OWN[thing] - torch.tensor([0, 1])
    ).all()  # eight frames of two pixels are one token
    assert visible[0, thing].all() and (places[0, ~thing] == OWN[~thing]).all()
    # behind the place that the thing has left, the background was hidden
    hidden = ~thing & (motion.region(0) == 1)
    assert hidden.any() and not visible[0, hidden].any()


def test_a_pan_moves_the_background_and_things_alike() -> None:
    places, visible = scene(Motion.STAY, Camera.RIGHT).locate(15, [15 - 8])
    moved = (
        OWN * 16 + 8 + torch.tensor([0, 8])
    )  # the camera went right: things were further right by eight pixels
    assert (places[0] == tokens_at(moved, GRID, (96, 128)))[visible[0]].all()
    assert visible[0].float().mean() > 0.7


def test_a_cut_ends_correspondence() -> None:
    motion = scene(Motion.STAY, Camera.STILL, shots=2)
    _, visible = motion.locate(17, [15, 16])
    assert not visible[0].any() and visible[1].all()
