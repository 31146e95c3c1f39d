"""Exact depth of a generated world, from its plan: one ray a pixel.

ViZDoom has a depth buffer of its own, but it is coarse: 8 bits, 7.11 map units a step, saturating at about
730 units where a world is 960 wide (measured by facing walls at known distances). The worlds are ours, so
their depth can be computed without error, and the engine's buffer serves as the check.

Camera: 90 degrees wide; Doom's pixels are 1.2 times as high as wide, which a 4:3 picture of square pixels
shows as a vertical focal length 1.2 times the horizontal one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastar.data.doom.camera import EYE, HEIGHT, WIDTH, Pose
from fastar.data.doom.maps import CELL, NARROW, WALL, World

FOCAL_X = WIDTH / 2  # pixels
FOCAL_Y = 1.2 * FOCAL_X
_COLUMN_SLOPES = (np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL_X  # to the right, per unit of depth
_ROW_SLOPES = (HEIGHT / 2 - np.arange(HEIGHT) - 0.5) / FOCAL_Y  # upwards, per unit of depth


class Raycaster:
    """Depth of one world. Build once, call `depth(pose)` for every frame."""

    def __init__(self, world: World) -> None:
        cells = world.cells
        edges = np.arange(cells + 1) * CELL
        middles = (np.arange(cells) + 0.5) * CELL
        doors = [middles - NARROW / 2, middles + NARROW / 2]  # a wide opening ends on the walls' own lines
        # Sector borders lie on these lines only, so a piece of a ray between two of them is in one sector or
        # in rock.
        self._lines = np.sort(np.concatenate([edges - WALL, edges + WALL, *doors]))
        self._heights = self._height_table(world)

    def _height_table(self, world: World) -> NDArray[np.float64]:
        """Ceiling over each box of the grid of lines, 0 in rock; [boxes along x, boxes along y]."""
        middles = (self._lines[1:] + self._lines[:-1]) / 2
        table = np.zeros((len(middles) + 2, len(middles) + 2))  # a rim of rock
        for i, x in enumerate(middles):
            for j, y in enumerate(middles):
                table[i + 1, j + 1] = _ceiling(world, float(x), float(y))
        return table

    def depth(self, pose: Pose) -> NDArray[np.float32]:
        """Distance along the view axis to the first surface, map units, float32 [96, 128]."""
        angle = np.deg2rad(pose.degrees)
        forward = np.array([np.cos(angle), np.sin(angle)])
        right = np.array([np.sin(angle), -np.cos(angle)])
        direction = forward[:, None] + right[:, None] * _COLUMN_SLOPES  # [2, W], per unit of depth
        origin = np.array([pose.x, pose.y], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings = (self._lines[None, :, None] - origin[:, None, None]) / direction[
                :, None, :
            ]  # [2, lines, W]
        times = crossings.reshape(-1, WIDTH)
        times = np.sort(np.where(np.isfinite(times) & (times > 0), times, np.inf), axis=0)
        starts = np.concatenate(
            [np.zeros((1, WIDTH)), times[:-1]]
        )  # a piece of ray: starts..times, one sector
        middles = np.where(np.isfinite(times), (starts + times) / 2, 0.0)
        box = [np.searchsorted(self._lines, origin[axis] + middles * direction[axis]) for axis in range(2)]
        ceiling = self._heights[box[0], box[1]]  # [pieces, W]
        rock = (ceiling == 0) & np.isfinite(times)
        wall = np.take_along_axis(starts, rock.argmax(axis=0)[None], axis=0)[
            0
        ]  # [W], depth of the first solid wall
        return self._vertical(starts, times, ceiling, wall)

    @staticmethod
    def _vertical(
        starts: NDArray[np.float64],
        ends: NDArray[np.float64],
        ceiling: NDArray[np.float64],
        wall: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """Cuts the column rays by floor, ceilings and the steps between ceilings."""
        depth = np.broadcast_to(wall, (HEIGHT, WIDTH)).copy()
        below = _ROW_SLOPES < 0
        depth[below] = np.minimum(depth[below], (EYE / -_ROW_SLOPES[below])[:, None])
        pieces = int((starts < wall).sum(axis=0).max())
        starts, ends, ceiling = starts[:pieces], ends[:pieces], ceiling[:pieces]
        reach = (ceiling - EYE)[None] / _ROW_SLOPES[~below][
            :, None, None
        ]  # [rows, pieces, W], meets that ceiling
        hit = np.maximum(reach, starts[None])
        hit = np.where((hit <= ends[None]) & (ceiling > 0)[None], hit, np.inf)
        depth[~below] = np.minimum(depth[~below], hit.min(axis=1))
        return depth.astype(np.float32)


def _ceiling(world: World, x: float, y: float) -> int:
    """Height of the ceiling at a map position; 0 in rock."""
    cell = world.cell_at(x, y)
    u, v = x - CELL * cell[0], y - CELL * cell[1]
    inside_x, inside_y = WALL < u < CELL - WALL, WALL < v < CELL - WALL
    if inside_x and inside_y:
        return world.ceilings[cell]
    if inside_y:
        other, across = (cell[0] + (1 if u > WALL else -1), cell[1]), v
    elif inside_x:
        other, across = (cell[0], cell[1] + (1 if v > WALL else -1)), u
    else:
        return 0
    edge = (cell, other) if cell < other else (other, cell)
    if edge not in world.openings or abs(across - CELL / 2) > world.openings[edge] / 2:
        return 0
    return world.ceilings[edge]
