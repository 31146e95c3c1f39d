"""Pictures of the nouns at the two sizes of the scenes. Licences: sprites_licence.txt."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastar.data.scenes.nouns import NOUNS

ATLAS = Path(__file__).with_name("sprites.png")
CELL, COLUMNS = 48, 8  # of the atlas: pixels, cells in a row
SIZES = {"small": 26, "large": 38}
"""Side of a sprite's square cell in pixels; the longer side of the sprite fills it."""

_OPAQUE = 128  # from this alpha on, a pixel belongs to the sprite


@cache
def sprites(size: str) -> Tensor:
    """uint8 [64, S, S, 4], RGBA (not premultiplied), in the order of NOUNS; S = SIZES[size]. Not to be written to."""
    from PIL import Image

    side = SIZES[size]
    with Image.open(ATLAS) as atlas:
        cells = []
        for number in range(len(NOUNS)):
            row, column = divmod(number, COLUMNS)
            left, top = column * CELL, row * CELL
            cell = atlas.crop((left, top, left + CELL, top + CELL))
            # Pillow scales whole numbers, premultiplied: the same pixels on every machine
            cells.append(np.asarray(cell.resize((side, side), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(cells))


@cache
def masks(size: str) -> Tensor:
    """bool [64, S, S]: pixels that belong to the sprite, and hide what is behind."""
    return sprites(size)[..., 3] >= _OPAQUE


@cache
def boxes(size: str) -> Tensor:
    """int64 [64, 4]: x0, y0, x1, y1 (exclusive) of each sprite within its cell."""
    found = []
    for mask in masks(size):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        found.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(found)
