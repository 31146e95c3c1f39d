"""Walks are valid, repeatable and full of returns; no engine needed."""

import math

import numpy as np
import pytest

from fastar.data.doom.camera import STEP, Action, Pose, hits_wall, trajectory
from fastar.data.doom.dataset import clip_truth
from fastar.data.doom.maps import make_world
from fastar.data.doom.policy import BEHAVIOURS, Walk, plan_clip, random_start, revisit, scripted
from fastar.data.doom.truth import seen_before


class OpenPlain:
    """A world without walls."""

    def is_free(self, x: float, y: float) -> bool:
        return True


@pytest.mark.parametrize("seed", range(8))
def test_clips_are_exact_valid_and_repeatable(seed: int) -> None:
    world = make_world(seed)
    walk = plan_clip(world, 150, np.random.default_rng(seed))
    assert len(walk.actions) == len(walk.poses) == 150
    assert walk.actions[0] == Action.NONE and set(walk.actions) <= set(Action)
    assert walk.poses == trajectory(world, walk.poses[0], walk.actions)
    assert all(world.is_free(pose.x, pose.y) for pose in walk.poses)
    again = plan_clip(world, 150, np.random.default_rng(seed))
    assert again.actions == walk.actions and again.poses == walk.poses


@pytest.mark.parametrize("deed", BEHAVIOURS, ids=lambda deed: deed.__name__)
def test_every_behaviour_comes_to_an_end(deed) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        world = make_world(seed)
        walk = Walk(world, random_start(world, rng), frames=10_000)
        deed(walk, rng)
        assert 1 < len(walk.actions) < 1_500


def test_the_camera_rarely_stands_still_or_pushes_against_walls() -> None:
    still = pushes = moves = 0
    for seed in range(20):
        walk = plan_clip(make_world(seed), 192, np.random.default_rng(seed))
        for before, after, action in zip(walk.poses, walk.poses[1:], walk.actions[1:], strict=False):
            still += before == after
            tries = action in (Action.FORWARD, Action.BACKWARD, Action.FORWARD_LEFT, Action.FORWARD_RIGHT)
            moves += tries
            pushes += tries and before[:2] == after[:2]
    assert still / (20 * 191) < 0.1
    assert pushes / moves < 0.05 and moves / (20 * 191) > 0.2


def test_dead_reckoning_mostly_holds() -> None:
    """Pushing against a wall is the one thing that an odometer cannot count."""
    off = []
    for seed in range(30):
        world = make_world(seed)
        walk = plan_clip(world, 240, np.random.default_rng(seed))
        counted = trajectory(OpenPlain(), walk.poses[0], walk.actions)  # type: ignore[arg-type]
        off += [math.dist(p[:2], q[:2]) / STEP for p, q in zip(walk.poses, counted, strict=True)]
    assert np.mean(np.array(off) > 3) < 0.05


def test_a_wall_is_hit_by_what_goes_into_it() -> None:
    world = make_world(0)
    walk = Walk(world, random_start(world, np.random.default_rng(0)), frames=10_000)
    while not hits_wall(world, walk.pose, Action.FORWARD):
        walk.act(Action.FORWARD)
    before = walk.pose
    for harmless in (Action.NONE, Action.TURN_LEFT, Action.TURN_RIGHT, Action.BACKWARD):
        assert not hits_wall(world, before, harmless)
    walk.act(Action.FORWARD)
    assert math.dist(before[:2], walk.pose[:2]) < STEP - 1


def test_revisit_ends_where_the_camera_once_stood() -> None:
    reached = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        walk = plan_clip(make_world(seed), 120, rng)
        walk.frames = 10_000
        revisit(walk, rng)
        end = walk.pose
        reached += any(p.heading == end.heading and math.dist(p[:2], end[:2]) < 13 for p in walk.poses[:88])
    assert reached >= 9


def test_most_of_what_comes_into_view_was_seen_long_ago() -> None:
    """Otherwise a memory beyond 16 frames would be of no use, and cache policies could not be told apart."""
    entering = returning = 0.0
    for seed in range(3):
        truth = clip_truth(plan_clip(make_world(seed), 192, np.random.default_rng(seed)))
        for frame in range(64, 192, 16):
            fresh = seen_before(truth["pose"], truth["depth"], frame, range(frame - 16, frame))
            old = seen_before(truth["pose"], truth["depth"], frame, range(frame - 16), among=~fresh)
            entering += float((~fresh).float().mean())
            returning += float(old.float().mean())
    assert returning / entering > 0.4


def test_script_holds_one_action() -> None:
    assert scripted(Action.TURN_LEFT, 4) == [0, 3, 3, 3]
    spin = trajectory(make_world(0), Pose(96, 96, 0), scripted(Action.TURN_LEFT, 49))
    assert spin[0] == spin[48]
