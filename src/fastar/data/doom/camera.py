"""The camera in a Doom world: seven actions and their exact kinematics, without the engine.

There is no inertia: a turn is 7.5 degrees, 48 turns close a circle, and back undoes forward to the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastar.data.doom.maps import World

HEIGHT, WIDTH = 96, 128  # of a frame, pixels
HEADINGS = 48  # a heading h is the angle 7.5 h degrees, counter-clockwise from the map's x axis
STEP = 16  # map units a forward or backward frame moves; a room is 192 wide
EYE = 41.0  # height of the camera above the floor, map units


class Action(IntEnum):
    """What the camera does in one frame. Action a_f leads to frame f; frame 0 has NONE."""

    NONE = 0
    FORWARD = 1
    BACKWARD = 2
    TURN_LEFT = 3
    TURN_RIGHT = 4
    FORWARD_LEFT = 5  # moves along the new heading
    FORWARD_RIGHT = 6


NUM_ACTIONS = 8  # size of an action vocabulary: the seven, and one spare (7) for a masked action in training
_TURN = {Action.TURN_LEFT: 1, Action.FORWARD_LEFT: 1, Action.TURN_RIGHT: -1, Action.FORWARD_RIGHT: -1}
_MOVE = {Action.FORWARD: 1, Action.FORWARD_LEFT: 1, Action.FORWARD_RIGHT: 1, Action.BACKWARD: -1}
# Whole map units, because `warp` takes integers: this is what makes back the exact inverse of forward.
_OFFSETS = [
    (round(STEP * np.cos(2 * np.pi * h / HEADINGS)), round(STEP * np.sin(2 * np.pi * h / HEADINGS)))
    for h in range(HEADINGS)
]


class Pose(NamedTuple):
    """Where the camera stands: map units, and heading in 7.5 degree steps."""

    x: int
    y: int
    heading: int

    @property
    def degrees(self) -> float:
        return 360.0 * self.heading / HEADINGS


def move(world: World, pose: Pose, action: int) -> Pose:
    """The pose one frame later. A wall stops the part of the motion that goes into it (the camera slides)."""
    if not 0 <= action < len(Action):
        raise ValueError(f"an action is one of 0 to {len(Action) - 1} (see Action), not {action}.")
    free = _unhindered(pose, action)
    for x, y in ((free.x, free.y), (free.x, pose.y), (pose.x, free.y)):
        if world.is_free(x, y):
            return Pose(x, y, free.heading)
    return Pose(pose.x, pose.y, free.heading)


def hits_wall(world: World, pose: Pose, action: int) -> bool:
    """Whether a wall stops the motion of `action`, or part of it: dead reckoning is wrong from there on."""
    return move(world, pose, action) != _unhindered(pose, action)


def _unhindered(pose: Pose, action: int) -> Pose:
    """The pose one frame later where there are no walls."""
    kind = Action(action)
    heading = (pose.heading + _TURN.get(kind, 0)) % HEADINGS
    sign = _MOVE.get(kind, 0)
    return Pose(pose.x + sign * _OFFSETS[heading][0], pose.y + sign * _OFFSETS[heading][1], heading)


def trajectory(world: World, start: Pose, actions: Sequence[int]) -> list[Pose]:
    """Poses of all frames of a clip; `actions[0]` must be NONE, the frame that stands at `start`."""
    if len(actions) == 0 or actions[0] != Action.NONE:
        raise ValueError("actions must begin with Action.NONE (0): no action leads to frame 0.")
    poses = [start]
    for action in actions[1:]:
        poses.append(move(world, poses[-1], action))
    return poses


def expected_flow_sign(action: int) -> int:
    """Sign of the mean horizontal optical flow (x to the right) that an action causes; 0 if it has none.

    Turning left moves the picture to the right (+1), turning right to the left (-1).
    """
    return _TURN.get(Action(action), 0)
