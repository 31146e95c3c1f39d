"""Where a token of a scripted scene was: the thing or the background at its centre, moved as the script says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.data.motion import token_centres, tokens_at
from fastar.data.scenes.render import truth
from fastar.data.scenes.script import HEIGHT, PANS, WIDTH, Script

BACKGROUND = -1


class ScenesMotion:
    """`fastar.data.motion.Motion` of one clip. A cut ends all correspondence, also of things that come back.

    A thing is taken to fill its box; of overlapping boxes the last in the order of mention counts, which stands in
    front. Plain backgrounds look alike everywhere: no matcher can find their points again.

    Args:
        script: of the clip.
        grid: rows and columns of tokens.
    """

    regions: tuple[str, ...] = ("background", "thing")

    def __init__(self, script: Script, grid: tuple[int, int]) -> None:
        self.grid, self._shown = grid, truth(script)
        self._centres = token_centres(grid, (HEIGHT, WIDTH))
        # columns that the background has moved to the left by since its cut
        pans = torch.tensor([PANS[shot.camera] for shot in script.shots])
        self._shift = pans[self._shown.shot] * self._shown.phase

    def locate(self, frame: int, earlier: Sequence[int]) -> tuple[Tensor, Tensor]:
        owner = self._owner(frame, self._centres[None])[0]
        found, seen = [], []
        for other in earlier:
            moved = self._moved(frame, other, owner)
            there = self._centres - moved
            inside = ((there >= 0) & (there < torch.tensor([HEIGHT, WIDTH]))).all(-1)
            same = self._owner(other, there[None])[0] == owner
            cut = self._shown.shot[frame] != self._shown.shot[other]
            found.append(tokens_at(there, self.grid, (HEIGHT, WIDTH)))
            seen.append(inside & same & ~cut)
        return torch.stack(found), torch.stack(seen)

    def region(self, frame: int) -> Tensor:
        return (self._owner(frame, self._centres[None])[0] != BACKGROUND).long()

    def _moved(self, frame: int, earlier: int, owner: Tensor) -> Tensor:
        """Rows and columns [n, 2] that each token's content has moved by since the frame `earlier`."""
        boxes = self._shown.boxes
        things = (boxes[frame, :, :2] - boxes[earlier, :, :2]).flip(-1).long()  # x, y -> row, column
        background = torch.stack([torch.tensor(0), self._shift[earlier] - self._shift[frame]])
        return torch.where(owner[:, None] == BACKGROUND, background, things[owner.clamp(min=0)])

    def _owner(self, frame: int, places: Tensor) -> Tensor:
        """Number of the thing at pixel positions [..., 2] (row, column), or `BACKGROUND`: int64 [...]."""
        row, column = places.unbind(-1)
        owner = torch.full(row.shape, BACKGROUND)
        for number, (x0, y0, x1, y1) in enumerate(self._shown.boxes[frame].tolist()):
            if self._shown.nouns[frame, number] >= 0:
                inside = (column >= x0) & (column < x1) & (row >= y0) & (row < y1)
                owner = owner.masked_fill(inside, number)
        return owner
