"""Three-axis rotary position embedding in Wan's layout, for any absolute frame index.

A head's D numbers are D/2 adjacent (interleaved) pairs; the first pairs turn with the frame, the next with
the row, the last with the column (44 / 42 / 42 of Wan's 128 dims). Angles are computed, never looked up in a
table of fixed length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid_positions(
    first_frame: int, num_frames: int, grid: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """Positions (frame, row, column) of `num_frames` frames of a `grid` (rows, columns) of tokens.

    Returns int64 [num_frames * rows * columns, 3], frame-major, then row, then column; frames are absolute
    indices.
    """
    frames = torch.arange(first_frame, first_frame + num_frames, device=device)
    rows, columns = (torch.arange(n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"), dim=-1).reshape(-1, 3)


class RotaryEmbedding:
    """Turns adjacent pairs of a head by angles that follow its position (RoPE, Su et al. 2021, on 3 axes).

    `head_dim` D is split over the axes as Wan does, h = w = 2 * (D // 6), t = D - 2 * h, unless `axis_dims` (t, h, w)
    says otherwise. Angles are formed and reduced to [-pi, pi] in float64, so frame 1,000,000 is as exact as frame
    0. The rotation itself runs in float32, or in float64 with `double=True` (as the original Wan code does; for
    parity studies), and the result has x's dtype.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        *,
        double: bool = False,
        axis_dims: tuple[int, int, int] | None = None,
    ) -> None:
        if head_dim < 6 or head_dim % 2:
            raise ValueError(
                f"head_dim must be even and at least 6, to be split over three axes; got {head_dim}."
            )
        self.head_dim = head_dim
        self.theta = theta
        self.dtype = torch.float64 if double else torch.float32
        spatial = 2 * (head_dim // 6)
        self.axis_dims = axis_dims or (head_dim - 2 * spatial, spatial, spatial)
        if sum(self.axis_dims) != head_dim or any(dim % 2 for dim in self.axis_dims):
            raise ValueError(f"axis_dims must be even and sum to {head_dim}, got {self.axis_dims}.")
        self._frequencies: dict[torch.device, tuple[Tensor, ...]] = {}
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every pair's angle, each [..., L, D/2], for integer `positions` [..., L, 3]."""
        if positions.shape[-1] != 3:
            raise ValueError(
                f"positions must end in 3 (frame, row, column), got shape {tuple(positions.shape)}."
            )
        turns = [
            positions[..., axis, None].to(torch.float64) * frequency
            for axis, frequency in enumerate(self._frequencies_on(positions.device))
        ]
        angle = torch.cat(turns, dim=-1)
        angle = (angle - 2 * math.pi * torch.round(angle / (2 * math.pi))).to(self.dtype)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., L, D] turned to `positions` [L, 3], or [..., L, 3] that broadcast to it; x's dtype."""
        return apply_rotation(x, self._turns(positions))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Inverse of `rotate` (up to rounding in x's dtype)."""
        cos, sin = self._turns(positions)
        return apply_rotation(x, (cos, -sin))

    def forget(self) -> None:
        """Make tables anew: a grid of positions has been written over."""
        self._last = None

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of `positions`; a grid [L, 3] is remembered, since every layer of a pass asks for the same.

        Larger tensors are cache slots, which change in place from layer to layer and so are never remembered.
        """
        if positions.dim() != 2 or torch.compiler.is_compiling():
            return self.tables(positions)
        if self._last is None or self._last[0] is not positions:
            self._last = (positions, self.tables(positions))
        return self._last[1]

    def _frequencies_on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._frequencies:
            self._frequencies[device] = tuple(
                1.0 / self.theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
                for dim in self.axis_dims
            )
        return self._frequencies[device]


def apply_rotation(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn adjacent pairs of x [..., L, D] by (cosine, sine) tables [..., L, D/2], in the tables' dtype."""
    cos, sin = tables
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic and cannot do complex
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # ten times faster than the above where every operation is a pass over memory
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)
