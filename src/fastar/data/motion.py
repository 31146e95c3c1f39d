"""Ground truth of motion on a grid of tokens: where what a token shows was in an earlier frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Motion(Protocol):
    """The truth about one video.

    Attributes:
        regions: names of the kinds of tokens.
    """

    regions: tuple[str, ...]

    def locate(self, frame: int, earlier: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where the points at the centres of a frame's n tokens were in K earlier frames.

        Returns:
            int64 [K, n, 2], row and column of the token that showed the point (of no use where it was not visible);
            bool [K, n], whether it was visible there.
        """

    def region(self, frame: int) -> Tensor:
        """int64 [n], the kind of each token, an index into `regions`."""


def token_centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """int64 [n, 2]: row and column of the pixel in the middle of each token, frames of `size` pixels, row-major."""
    places = [
        torch.arange(count) * pixels // count + pixels // (2 * count)
        for count, pixels in zip(grid, size, strict=True)
    ]
    return torch.stack(torch.meshgrid(*places, indexing="ij"), -1).reshape(-1, 2)


def tokens_at(places: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Row and column [..., 2] (int64) of the token that holds each pixel position [..., 2] (row, column)."""
    cells = torch.tensor([size[0] / grid[0], size[1] / grid[1]])
    return (places.float() / cells).floor().long()
