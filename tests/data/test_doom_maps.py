"""Generated worlds and the camera in them; no engine needed."""

import re
import struct

import numpy as np
import pytest

from fastar.data.doom.camera import HEADINGS, Action, Pose, expected_flow_sign, move, trajectory
from fastar.data.doom.maps import CELL, CLEARANCE, WALL, World, make_world, write_wad
from fastar.data.doom.textures import FAMILIES, SIZE, Pattern, paint


def numbers_in(world: World) -> tuple[set[int], set[int]]:
    """Textures that a world names: on walls, and on floors and ceilings."""
    walls = set(re.findall(r'texture(?:middle|top)="@(\d+)"', world.textmap))
    flats = set(re.findall(r'texture(?:floor|ceiling)="@(\d+)"', world.textmap))
    return {int(number) for number in walls}, {int(number) for number in flats}


def test_world_is_a_function_of_its_seed_and_split() -> None:
    assert make_world(7) == make_world(7)
    assert make_world(7).textmap != make_world(8).textmap
    assert make_world(7).openings != make_world(7, split="heldout").openings


def test_every_world_has_textures_of_its_own() -> None:
    first, again, other = (make_world(seed).textures() for seed in (3, 3, 4))
    assert first == again and not set(first) & set(other)
    world = make_world(3)
    walls, flats = numbers_in(world)
    assert walls and flats and not walls & flats
    assert max(walls | flats) < world.num_textures == len(first)
    assert all(png.startswith(b"\x89PNG") for png in first)


def test_heldout_patterns_never_occur_in_training() -> None:
    assert not set(FAMILIES["train"]) & set(FAMILIES["heldout"])


@pytest.mark.parametrize("pattern", [*FAMILIES["train"], *FAMILIES["heldout"]])
def test_patterns_have_contrast_and_no_seams(pattern: Pattern) -> None:
    for seed in range(20):
        share = pattern(np.random.default_rng(seed))
        assert share.shape == (SIZE, SIZE) and 0 <= share.min() < 0.3 and 0.6 < share.max() <= 1
        for axis in (0, 1):
            steps = np.abs(np.diff(share, axis=axis, append=np.take(share, [0], axis)))
            assert steps.max() < 0.45  # and the step from the last pixel to the first is among them


def test_textures_are_colours_between_dim_and_bright() -> None:
    pictures = np.stack([paint(np.random.default_rng(seed), "train") for seed in range(50)])
    assert pictures.shape == (50, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    assert pictures.mean(axis=(1, 2, 3)).std() > 15  # worlds can be told apart by colour
    assert pictures.std(axis=(1, 2)).max(axis=1).min() > 1


@pytest.mark.parametrize("seed", range(5))
def test_every_room_can_be_reached_and_there_are_circuits(seed: int) -> None:
    world = make_world(seed)
    reached, frontier = {(0, 0)}, [(0, 0)]
    while frontier:
        for other in world.neighbours(frontier.pop()):
            if other not in reached:
                reached.add(other)
                frontier.append(other)
    assert len(reached) == 25
    assert len(world.openings) > 24  # a tree of 25 rooms has 24


def test_walls_keep_the_camera_away_and_openings_let_it_through() -> None:
    world = make_world(0)
    gap = WALL + CLEARANCE
    for x in range(5):
        for y in range(5):
            assert world.is_free(*world.centre((x, y)))
            assert not world.is_free(CELL * x + gap - 1, CELL * y + gap - 1)  # a corner of a room
            if x < 4:
                door = (CELL * (x + 1), CELL * (y + 0.5))
                assert world.is_free(*door) == (((x, y), (x + 1, y)) in world.openings)
                straight = world.line_is_free(world.centre((x, y)), world.centre((x + 1, y)))
                assert straight == (((x, y), (x + 1, y)) in world.openings)


def test_wad_holds_the_worlds_in_order(tmp_path) -> None:
    worlds = [make_world(seed) for seed in range(3)]
    write_wad(tmp_path / "worlds.wad", worlds)
    data = (tmp_path / "worlds.wad").read_bytes()
    magic, count, offset = struct.unpack("<4sii", data[:12])
    assert (magic, count) == (b"PWAD", 3 * 3 + 2 + sum(world.num_textures for world in worlds))
    lumps = [struct.unpack("<ii8s", data[offset + 16 * i : offset + 16 * i + 16]) for i in range(count)]
    names = [name.rstrip(b"\0").decode() for _, _, name in lumps]
    assert names[:4] == ["MAP01", "TEXTMAP", "ENDMAP", "MAP02"]
    assert names[9] == "TX_START" and names[-1] == "TX_END" and len(set(names[10:-1])) == count - 11
    start, size, _ = lumps[4]
    textmap = data[start : start + size].decode()
    assert textmap == worlds[1].textmap.replace('"@', '"W02T')
    assert set(re.findall(r'"(W\d+T\d+)"', textmap)) <= set(names)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        make_world(0, split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cells must be at least 2"):
        make_world(0, cells=1)


def test_back_undoes_forward_and_48_turns_close() -> None:
    world = make_world(1)
    x, y = (int(value) for value in world.centre((2, 2)))
    for heading in range(HEADINGS):
        start = Pose(x, y, heading)
        there = move(world, start, Action.FORWARD)
        assert there != start and move(world, there, Action.BACKWARD) == start
    spin = trajectory(world, Pose(x, y, 5), [Action.NONE] + [Action.TURN_LEFT] * HEADINGS)
    assert spin[0] == spin[-1] and len(set(spin)) == HEADINGS
    assert spin[24].degrees == pytest.approx(spin[0].degrees + 180)


def test_walls_stop_the_camera() -> None:
    world = make_world(1)
    x, y = (int(value) for value in world.centre((0, 0)))
    facing_west = trajectory(world, Pose(x, y, 24), [Action.NONE] + [Action.FORWARD] * 30)
    assert facing_west[-1] == facing_west[-2]
    assert WALL + CLEARANCE <= facing_west[-1].x < WALL + CLEARANCE + 16
    assert all(world.is_free(pose.x, pose.y) for pose in facing_west)


def test_actions_are_checked() -> None:
    world = make_world(1)
    with pytest.raises(ValueError, match="an action is one of 0 to 6"):
        move(world, Pose(96, 96, 0), 7)
    with pytest.raises(ValueError, match="must begin with Action"):
        trajectory(world, Pose(96, 96, 0), [Action.FORWARD])
    assert [expected_flow_sign(action) for action in Action] == [0, 0, 0, 1, -1, 1, -1]
