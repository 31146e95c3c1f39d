"""Painted textures: the walls, floors and ceilings of a world, which no other world shows.

Two colours in a soft pattern, drawn anew for every texture. Freedoom's own textures are the wrong test for a small
model: their detail is so fine that a frame moved by one pixel is 22.7 dB from itself (29.4 dB with these; measured by
`test_a_frame_moved_by_one_pixel_is_still_much_like_itself`), so that a backbone spends its capacity on grain, and what
it remembers of a place hardly shows in a score.

Held out are families of patterns, as well as seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "heldout"]

SIZE = 128  # pixels, and map units, on a side; patterns repeat seamlessly

Pattern = Callable[[np.random.Generator], NDArray[np.float32]]
"""Draws one pattern: float32 [SIZE, SIZE] in [0, 1], the share of the second colour."""

_ANGLE = 2 * np.pi * (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
_X, _Y = np.meshgrid(_ANGLE, _ANGLE)


def paint(rng: np.random.Generator, split: Split) -> NDArray[np.uint8]:
    """One texture, RGB [SIZE, SIZE, 3]: a pattern of a family of `split` between two related colours."""
    families = FAMILIES[split]
    share = families[int(rng.integers(len(families)))](rng)[..., None]
    first, other = _colour(rng), _colour(rng)
    second = first + rng.uniform(0.3, 0.7) * (other - first)
    return np.round(255 * (first + share * (second - first))).astype(np.uint8)


def stripes(rng: np.random.Generator) -> NDArray[np.float32]:
    """Soft bars: upright, level or slanting."""
    across, down = ((1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (1, -1))[int(rng.integers(6))]
    return _soft(rng, np.sin(across * _X + down * _Y))


def checks(rng: np.random.Generator) -> NDArray[np.float32]:
    """A soft chessboard of 64 or 32 map units."""
    across, down = rng.integers(1, 3, size=2)
    return _soft(rng, np.sin(across * _X) * np.sin(down * _Y))


def clouds(rng: np.random.Generator) -> NDArray[np.float32]:
    """A few random waves on top of each other."""
    total = np.zeros_like(_X)
    for across, down in ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2)):
        total += rng.normal() * np.sin(across * _X + down * _Y + rng.uniform(0, 2 * np.pi))
    return _soft(rng, total / 1.7)


def panels(rng: np.random.Generator) -> NDArray[np.float32]:
    """A square with a margin."""
    inside = np.minimum(1 - np.cos(_X), 1 - np.cos(_Y)) - rng.uniform(0.15, 0.6)
    return _soft(rng, inside * 2)


def rings(rng: np.random.Generator) -> NDArray[np.float32]:
    """Circles round the middle of the tile."""
    return _soft(
        rng, np.cos(rng.uniform(1.5, 3.0) * np.hypot(np.sin(_X / 2) - 1, np.sin(_Y / 2) - 1) * np.pi)
    )


def dots(rng: np.random.Generator) -> NDArray[np.float32]:
    """A round spot."""
    return _soft(rng, -np.cos(_X) - np.cos(_Y) - rng.uniform(-0.5, 0.9))


def zigzag(rng: np.random.Generator) -> NDArray[np.float32]:
    """Bent bars."""
    bend = rng.uniform(0.6, 1.4) * np.sin(_Y)
    return _soft(rng, np.sin((_X if rng.random() < 0.5 else 2 * _X) + bend))


FAMILIES: dict[Split, tuple[Pattern, ...]] = {
    "train": (stripes, checks, clouds, panels),
    "heldout": (rings, dots, zigzag),
}


def _soft(rng: np.random.Generator, wave: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """From a wave to two levels with a soft edge between them."""
    return (1 / (1 + np.exp(-rng.uniform(2.0, 6.0) * wave))).astype(np.float32)


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A colour from dim to bright and from grey to vivid, RGB in [0, 1]."""
    hue, vivid, bright = rng.uniform(0, 1), rng.uniform(0.1, 0.8), rng.uniform(0.3, 1.0)
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (bright * (1 - vivid * (1 - wheel))).astype(np.float32)
