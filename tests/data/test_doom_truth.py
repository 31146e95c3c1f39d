"""The truth about revisits against references that do not use it: angles, plans and ray marching."""

import numpy as np
import pytest
import torch

from fastar.data.doom.camera import EYE, HEIGHT, WIDTH, Action, Pose, trajectory
from fastar.data.doom.dataset import clip_truth
from fastar.data.doom.maps import CELL, NARROW, WALL, World, make_world
from fastar.data.doom.policy import Walk, plan_clip, scripted
from fastar.data.doom.raycast import FOCAL_X, FOCAL_Y, Raycaster, _ceiling
from fastar.data.doom.returns import ReturnClips
from fastar.data.doom.truth import first_returns, long_return_share, return_mask, seen_before, unproject


def spin_truth(world: World) -> dict[str, torch.Tensor]:
    walk = Walk(world, Pose(*(int(v) for v in world.centre((1, 1))), 3), frames=49)
    walk.act(Action.TURN_LEFT, 48)
    return clip_truth(walk)


def march(world: World, pose: Pose, row: int, column: int, step: float = 0.25) -> float:
    """Depth of one pixel by walking along its ray until it leaves the air."""
    angle = np.deg2rad(pose.degrees)
    right = (column + 0.5 - WIDTH / 2) / FOCAL_X
    up = (HEIGHT / 2 - row - 0.5) / FOCAL_Y
    depth = 0.0
    while True:
        depth += step
        x = pose.x + depth * (np.cos(angle) + right * np.sin(angle))
        y = pose.y + depth * (np.sin(angle) - right * np.cos(angle))
        z = EYE + depth * up
        if not 0 < z < _ceiling(world, x, y):
            return depth


def test_raycast_equals_ray_marching() -> None:
    rng = np.random.default_rng(0)
    world = make_world(4)
    caster = Raycaster(world)
    walk = plan_clip(world, 60, rng)
    for pose in walk.poses[::12]:
        depth = caster.depth(pose)
        for row, column in zip(rng.integers(HEIGHT, size=30), rng.integers(WIDTH, size=30), strict=True):
            assert depth[row, column] == pytest.approx(march(world, pose, row, column), abs=0.3)


def test_a_wall_straight_ahead_has_its_plain_distance() -> None:
    world = make_world(3)
    for distance in (48, 80, 144):
        depth = Raycaster(world).depth(Pose(CELL - WALL - distance, CELL // 2, 0))
        assert ((0, 0), (1, 0)) not in world.openings  # so the wall closes the first room to the east
        assert depth[HEIGHT // 2, WIDTH // 2] == pytest.approx(distance, abs=1e-3)


def test_unprojected_points_lie_on_the_surfaces() -> None:
    world = make_world(4)
    truth = clip_truth(plan_clip(world, 8, np.random.default_rng(1)))
    points = unproject(truth["pose"][5], truth["depth"][5]).view(HEIGHT, WIDTH, 3)
    assert points[..., 2].min() > -0.5 and points[..., 2].max() < 160.5
    heights = points[..., 2].round().long()
    ceilings = set(world.ceilings.values())
    flat = sum((heights == height).float().mean() for height in {0, *ceilings})
    assert (heights == 0).float().mean() > 0.05 and flat > 0.1  # floor; floor and ceilings
    x, y = points[..., 0] % CELL, points[..., 1] % CELL
    on_wall = torch.stack(
        [(line - line_of).abs() < 0.5 for line in (x, y) for line_of in (WALL, CELL - WALL)]
    )
    doors = (CELL / 2 - NARROW / 2, CELL / 2 + NARROW / 2)
    on_jamb = torch.stack([(line - line_of).abs() < 0.5 for line in (x, y) for line_of in doors])
    on_plane = on_wall.any(0) | on_jamb.any(0) | torch.isin(heights, torch.tensor([0, *ceilings]))
    assert on_plane.float().mean() > 0.99


def test_spin_against_angles() -> None:
    """Turning on the spot, a pixel was seen in frame k exactly if its ray falls into that frame's pyramid."""
    truth = spin_truth(make_world(2))
    column_slope = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL_X
    row_slope = (HEIGHT / 2 - torch.arange(HEIGHT) - 0.5) / FOCAL_Y
    for steps in (4, 8, 12, 30):
        mask = seen_before(truth["pose"], truth["depth"], 40, range(40 - steps, 41 - steps))
        angle = -torch.atan(column_slope) + torch.deg2rad(torch.tensor(7.5 * steps))  # left of the old axis
        ahead = torch.cos(angle) / torch.cos(torch.atan(column_slope))  # old depth per unit of new depth
        wide = (ahead > 0) & (torch.tan(angle).abs() < 1)
        high = (row_slope[:, None] / ahead).abs() < HEIGHT / 2 / FOCAL_Y
        expected = high & wide
        # Edges between surfaces may fall on either side: allow for 4 % of the pixels.
        assert (mask != expected).float().mean() < 0.04
        assert bool(expected.any()) == (steps < 12)
    assert seen_before(truth["pose"], truth["depth"], 48, range(0, 1)).float().mean() > 0.97


def test_a_wall_hides_what_is_behind_it() -> None:
    world = make_world(3)
    assert ((0, 0), (1, 0)) not in world.openings
    walk = Walk(world, Pose(96, 96, 0), frames=2)
    walk.poses.append(
        Pose(CELL + 40, 96, 0)
    )  # in the next room, looking the same way: frame 0 saw the wall only
    walk.actions.append(Action.NONE)
    truth = clip_truth(walk)
    assert not seen_before(truth["pose"], truth["depth"], 1, range(0, 1)).any()


def test_return_mask_means_seen_long_ago_and_not_lately() -> None:
    truth = spin_truth(make_world(2))
    pose, depth = truth["pose"], truth["depth"]
    # Frame 48 closes the circle: frames 0..11 saw its view, and frames 37..47 come up to it again.
    full = return_mask(pose, depth, 48, history_end=30, recent=10)
    assert full.float().mean() > 0.9
    late = return_mask(pose, depth, 48, history_end=48, recent=16)
    assert late.float().mean() < 0.15
    shares = long_return_share(pose, depth, range(40, 49, 4))
    assert shares.shape == (3,) and shares[-1] == late.float().mean()
    with pytest.raises(ValueError, match="need recent < history_end"):
        return_mask(pose, depth, 10, history_end=12)


def test_first_returns_takes_the_first_frames_with_a_share() -> None:
    masks = torch.zeros(5, 4, 5, dtype=torch.bool)
    masks[1, 0, :2] = masks[3, 0, :1] = masks[4, :2] = True
    assert first_returns(masks, share=0.1, count=8).tolist() == [1, 4]
    assert first_returns(masks, share=0.05, count=2).tolist() == [1, 3]


def test_return_plans_hold_what_they_promise() -> None:
    clips = ReturnClips(clips=2, history=80, future=40, cells=3, seed=1)
    for index in range(2):
        walk, truth = clips.plan(index)
        assert walk.poses == trajectory(walk.world, walk.poses[0], walk.actions) and len(walk.poses) == 120
        assert walk.world.split == "heldout"
        frames = truth["return_frames"]
        assert frames.shape == (8,) and (frames.diff() > 0).all() and frames[0] >= 80 and frames[-1] < 120
        assert truth["return_masks"].flatten(1).float().mean(1).min() >= 0.1
        pose, depth, frame, mask = truth["pose"], truth["depth"], int(frames[0]), truth["return_masks"][0]
        assert not (mask & seen_before(pose, depth, frame, range(64, 80))).any()
        assert torch.equal(mask & seen_before(pose, depth, frame, range(0, 64)), mask)
        again, _ = clips.plan(index)
        assert again.actions == walk.actions and again.poses == walk.poses


def test_what_returns_was_left_behind_anywhere_in_the_history() -> None:
    """Half a history of memory is far from all of it; after short absences it is nearly all."""

    def last_seen_in_the_older_half(**absence: int) -> float:
        clips, shares = ReturnClips(clips=8, **absence), []
        for index in range(8):
            _, truth = clips.plan(index)
            frame, mask = int(truth["return_frames"][4]), truth["return_masks"][4]
            newer_half = seen_before(truth["pose"], truth["depth"], frame, range(96, 192))
            shares.append(float((mask & ~newer_half).sum() / mask.sum()))
        return sum(shares) / 8

    assert 0.25 < last_seen_in_the_older_half() < 0.6
    assert last_seen_in_the_older_half(longest_absence=32, most_rooms=3) < 0.2


def test_impossible_returns_are_refused() -> None:
    with pytest.raises(ValueError, match="need history > recent"):
        ReturnClips(clips=1, history=16)
    with pytest.raises(ValueError, match="need longest_absence > 16 and most_rooms >= 1, not 16 and 5"):
        ReturnClips(clips=1, longest_absence=16)
    with pytest.raises(ValueError, match=r"clip 0: no way back with 8 frames of 100% returning pixels"):
        ReturnClips(clips=1, history=24, future=8, share=1.0, cells=2).plan(0)


def test_scripts_are_walkable() -> None:
    poses = trajectory(make_world(0), Pose(96, 96, 0), scripted(Action.NONE, 3))
    assert poses == [Pose(96, 96, 0)] * 3
