"""Where a Doom token was: its surface point, from pose and depth, projected into earlier frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.data.doom.camera import HEIGHT, WIDTH
from fastar.data.doom.truth import project, unproject, visible
from fastar.data.motion import token_centres, tokens_at

FLOOR = 1.0  # height in map units below which a point is on the floor


class DoomMotion:
    """`fastar.data.motion.Motion` of one clip.

    Args:
        pose, depth: [F, 4] and [F, 96, 128], as `DoomClips(with_truth=True)` gives them.
        grid: rows and columns of tokens.
    """

    regions: tuple[str, ...] = ("floor", "wall or ceiling")

    def __init__(self, pose: Tensor, depth: Tensor, grid: tuple[int, int]) -> None:
        self.pose, self.depth, self.grid = pose, depth.float(), grid
        row, column = token_centres(grid, (HEIGHT, WIDTH)).unbind(-1)
        self._pixels = row * WIDTH + column

    def locate(self, frame: int, earlier: Sequence[int]) -> tuple[Tensor, Tensor]:
        points, frames = self._points(frame), list(earlier)
        x, y, _, _ = project(points, self.pose[frames])
        pixels = torch.stack([(y + 1) * HEIGHT / 2, (x + 1) * WIDTH / 2], -1)
        places = tokens_at(pixels, self.grid, (HEIGHT, WIDTH))
        return places, visible(points, self.pose[frames], self.depth[frames])

    def region(self, frame: int) -> Tensor:
        return (self._points(frame)[:, 2] >= FLOOR).long()

    def _points(self, frame: int) -> Tensor:
        return unproject(self.pose[frame], self.depth[frame])[self._pixels]
