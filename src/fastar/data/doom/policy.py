"""Policies that write clips full of returns: things seen long ago come back into view.

A policy is planned on the map before anything is rendered (poses are exact, see env.py), so it never gets
stuck. Each behaviour below adds the actions of one deed - a spin, a look aside and back, a walk there and
back, a lap of a circuit - to a `Walk`; a clip is a random sequence of deeds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from fastar.data.doom.camera import HEADINGS, STEP, Action, Pose, hits_wall, move
from fastar.data.doom.maps import CELL, Cell, World

_LEFT, _RIGHT = Action.TURN_LEFT, Action.TURN_RIGHT
_APPROACH = 44  # distance from an opening, map units, at which a walk lines up with it
_ARRIVED = 12.0  # a target nearer than this is reached, map units


class Walk:
    """A clip in the making: actions, poses and the rooms visited so far, up to `frames` frames."""

    def __init__(self, world: World, start: Pose, frames: int) -> None:
        self.world, self.frames = world, frames
        self.actions: list[int] = [Action.NONE]
        self.poses: list[Pose] = [start]

    @property
    def pose(self) -> Pose:
        return self.poses[-1]

    @property
    def cell(self) -> Cell:
        return self.world.cell_at(self.pose.x, self.pose.y)

    @property
    def full(self) -> bool:
        return len(self.actions) >= self.frames

    def act(self, action: int, times: int = 1) -> None:
        """Adds an action; once the clip is full, further actions are dropped."""
        for _ in range(min(times, self.frames - len(self.actions))):
            self.poses.append(move(self.world, self.pose, action))
            self.actions.append(int(action))

    def turn(self, steps: int) -> None:
        """Turns on the spot by 7.5 degrees x steps, positive to the left."""
        self.act(_LEFT if steps > 0 else _RIGHT, abs(steps))

    def face(self, heading: int) -> None:
        """Turns on the spot to a heading, the short way."""
        self.turn(_short(heading - self.pose.heading))

    def go_to(self, x: float, y: float) -> None:
        """Walks to a point in plain sight; gives up after four times the frames it should need."""
        patience = 4 * (int(math.dist((self.pose.x, self.pose.y), (x, y)) / STEP) + HEADINGS // 2)
        for _ in range(patience):
            distance = math.dist((self.pose.x, self.pose.y), (x, y))
            if distance < _ARRIVED or self.full:
                return
            wanted = round(math.atan2(y - self.pose.y, x - self.pose.x) * HEADINGS / (2 * math.pi))
            error = _short(wanted - self.pose.heading)
            if error == 0:
                before = self.pose
                self.act(Action.FORWARD)
                if self.pose == before:  # a wall: the point was not in plain sight
                    return
                continue
            curve = Action.FORWARD_LEFT if error > 0 else Action.FORWARD_RIGHT
            # A curve has a radius of about 122 units: near the target only a turn on the spot can meet it.
            if abs(error) <= 4 and distance > 16 * abs(error) + 24 and self._keeps_off_walls(curve):
                self.act(curve)
            else:
                self.act(_LEFT if error > 0 else _RIGHT)

    def follow(self, cells: Sequence[Cell], rng: np.random.Generator) -> None:
        """Walks through neighbouring rooms, each at a random point near its middle."""
        for cell in cells:
            here = self.cell
            if here == cell:
                continue
            (ax, ay), (bx, by) = self.world.centre(here), self.world.centre(cell)
            ux, uy = (bx - ax) / CELL, (by - ay) / CELL
            door = ((ax + bx) / 2, (ay + by) / 2)
            target = _near_centre(self.world, cell, rng)
            if not self.world.line_is_free((self.pose.x, self.pose.y), target):
                self.go_to(door[0] - _APPROACH * ux, door[1] - _APPROACH * uy)
                self.go_to(door[0] + _APPROACH * ux, door[1] + _APPROACH * uy)
            self.go_to(*target)
            if self.full or self.cell != cell:
                return

    def _keeps_off_walls(self, action: int) -> bool:
        after = move(self.world, self.pose, action)
        ahead = math.radians(after.degrees)
        margin = (after.x + STEP * math.cos(ahead), after.y + STEP * math.sin(ahead))
        return (after.x, after.y) != (self.pose.x, self.pose.y) and self.world.is_free(*margin)


def _short(steps: int) -> int:
    """A turn in (-24, 24] steps equal to `steps` modulo a full circle."""
    return (steps + HEADINGS // 2 - 1) % HEADINGS - HEADINGS // 2 + 1


def _near_centre(world: World, cell: Cell, rng: np.random.Generator) -> tuple[float, float]:
    x, y = world.centre(cell)
    dx, dy = rng.integers(-32, 33, size=2)
    return x + int(dx), y + int(dy)


def shortest_path(
    world: World, start: Cell, goal: Cell, closed: frozenset[tuple[Cell, Cell]] = frozenset()
) -> list[Cell]:
    """Rooms after `start` up to `goal`, breadth first, without the directed edges `closed`; or []."""
    came: dict[Cell, Cell] = {start: start}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        if cell == goal:
            path = []
            while cell != start:
                path.append(cell)
                cell = came[cell]
            return path[::-1]
        for other in world.neighbours(cell):
            if other not in came and (cell, other) not in closed:
                came[other] = cell
                queue.append(other)
    return []


def _random_path(world: World, start: Cell, length: int, rng: np.random.Generator) -> list[Cell]:
    """A walk of `length` rooms that turns back only in dead ends."""
    path, previous, cell = [], start, start
    for _ in range(length):
        options = [other for other in world.neighbours(cell) if other != previous] or [previous]
        previous, cell = cell, options[rng.integers(len(options))]
        path.append(cell)
    return path


def _side(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def spin(walk: Walk, rng: np.random.Generator) -> None:
    """A full circle on the spot, sometimes two."""
    walk.turn(_side(rng) * HEADINGS * (2 if rng.random() < 0.2 else 1))


def look_aside(walk: Walk, rng: np.random.Generator) -> None:
    """Turns 60 to 180 degrees away, waits, and turns back the same way; sometimes to both sides."""
    side, steps = _side(rng), int(rng.integers(8, 25))
    for sign in (side, -side)[: 1 + int(rng.random() < 0.4)]:
        walk.turn(sign * steps)
        walk.act(Action.NONE, int(rng.integers(0, 9)))
        walk.turn(-sign * steps)


def there_and_back(walk: Walk, rng: np.random.Generator) -> None:
    """Walks one to three rooms away and returns, turned round or backwards, then looks as before."""
    start, heading = walk.cell, walk.pose.heading
    if rng.random() < 0.35:
        before = len(walk.actions)
        options = walk.world.neighbours(start)
        x, y = walk.world.centre(options[rng.integers(len(options))])
        walk.face(round(math.atan2(y - walk.pose.y, x - walk.pose.x) * HEADINGS / (2 * math.pi)))
        for _ in range(int(rng.integers(8, 25))):
            if move(walk.world, walk.pose, Action.FORWARD)[:2] == walk.pose[:2]:
                break
            walk.act(Action.FORWARD)
        steps = sum(action == Action.FORWARD for action in walk.actions[before:])
        walk.act(Action.NONE, int(rng.integers(0, 6)))
        walk.act(Action.BACKWARD, steps)
    else:
        path = _random_path(walk.world, start, int(rng.integers(1, 4)), rng)
        walk.follow(path, rng)
        if rng.random() < 0.5:
            look_aside(walk, rng)
        walk.follow([*path[-2::-1], start], rng)
    walk.face(heading)


def circuit(walk: Walk, rng: np.random.Generator) -> None:
    """Leaves through one opening and comes home through another; wanders where there is no circuit."""
    home, world = walk.cell, walk.world
    heading = walk.pose.heading
    for index in rng.permutation(len(world.neighbours(home))):
        first = world.neighbours(home)[index]
        way = shortest_path(world, first, home, closed=frozenset({(first, home)}))
        if way:
            for _ in range(1 + int(rng.random() < 0.3)):
                walk.follow([first, *way], rng)
            walk.face(heading)
            return
    wander(walk, rng)


def wander(walk: Walk, rng: np.random.Generator, rooms: int | None = None) -> None:
    """Walks on through `rooms` rooms, two to five if not given."""
    walk.follow(_random_path(walk.world, walk.cell, rooms or int(rng.integers(2, 6)), rng), rng)


def revisit(walk: Walk, rng: np.random.Generator) -> None:
    """Goes back to where the camera stood at least 32 frames ago and takes the same pose."""
    if len(walk.poses) <= 32:
        return wander(walk, rng)
    past = walk.poses[int(rng.integers(0, len(walk.poses) - 32))]
    walk.follow(shortest_path(walk.world, walk.cell, walk.world.cell_at(past.x, past.y)), rng)
    walk.go_to(past.x, past.y)
    walk.face(past.heading)


def fidget(walk: Walk, rng: np.random.Generator) -> None:
    """Random actions, each held for 2 to 10 frames, or until a wall is reached; one in three pushes against it once.

    Every push puts dead reckoning off by up to a step for the rest of the clip.
    """
    for _ in range(int(rng.integers(3, 9))):
        action, pushes = int(rng.integers(len(Action))), rng.random() < 1 / 3
        for _ in range(int(rng.integers(2, 11))):
            at_wall = hits_wall(walk.world, walk.pose, action)
            if pushes or not at_wall:
                walk.act(action)
            if at_wall:
                break


def pause(walk: Walk, rng: np.random.Generator) -> None:
    """Stands still for 2 to 12 frames."""
    walk.act(Action.NONE, int(rng.integers(2, 13)))


BEHAVIOURS: dict[Callable[[Walk, np.random.Generator], None], float] = {
    spin: 0.13,
    look_aside: 0.22,
    there_and_back: 0.2,
    circuit: 0.15,
    wander: 0.08,
    revisit: 0.1,
    fidget: 0.08,
    pause: 0.04,
}


def random_start(world: World, rng: np.random.Generator) -> Pose:
    """A pose near the middle of a random room."""
    x, y = _near_centre(world, (int(rng.integers(world.cells)), int(rng.integers(world.cells))), rng)
    return Pose(int(x), int(y), int(rng.integers(HEADINGS)))


def extend(walk: Walk, rng: np.random.Generator, until: int) -> None:
    """Adds behaviours drawn with the weights of BEHAVIOURS until the walk has at least `until` frames."""
    deeds, weights = list(BEHAVIOURS), np.array(list(BEHAVIOURS.values()))
    while len(walk.actions) < until:
        deeds[int(rng.choice(len(deeds), p=weights / weights.sum()))](walk, rng)


def plan_clip(world: World, frames: int, rng: np.random.Generator) -> Walk:
    """A clip of exactly `frames` frames of random behaviours from a random start."""
    walk = Walk(world, random_start(world, rng), frames)
    extend(walk, rng, until=frames)
    return walk


def scripted(action: Action, frames: int) -> list[int]:
    """NONE and then one action held: the script of tests such as "turn left for N frames"."""
    return [int(Action.NONE)] + [int(action)] * (frames - 1)
