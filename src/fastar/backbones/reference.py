"""Two `Attend`s without a cache: what training and parity are defined by.

Both build their mask densely and call plain scaled dot-product attention, so they are for reference, not for
speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastar.attention.context import Stream
from fastar.attention.rope import RotaryEmbedding, grid_positions


class FullAttend:
    """Bidirectional attention over all tokens of the call, as the original (non-causal) Wan has it.

    `grid` is the (rows, columns) of tokens in a frame; the first frame of a call has absolute index
    `first_frame`.
    """

    def __init__(self, *, rope: RotaryEmbedding, grid: tuple[int, int], first_frame: int = 0) -> None:
        self.rope = rope
        self.grid = grid
        self.first_frame = first_frame
        self._positions: Tensor | None = None

    def __call__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if stream != "self":  # the prompt has no place in space and time
            return F.scaled_dot_product_attention(q, k, v)
        positions = self._positions_of(q)
        return F.scaled_dot_product_attention(
            self.rope.rotate(q, positions),
            self.rope.rotate(k, positions),
            v,
            attn_mask=self.mask(positions[:, 0]),
        )

    def mask(self, frames: Tensor) -> Tensor | None:
        """Who sees whom among tokens of absolute `frames` [L]: boolean [L, L], True where attended, or None
        for all.
        """
        return None

    def _positions_of(self, q: Tensor) -> Tensor:
        tokens_per_frame = self.grid[0] * self.grid[1]
        if q.shape[-2] % tokens_per_frame:
            raise ValueError(
                f"{q.shape[-2]} tokens are not whole frames of {tokens_per_frame}; check the grid."
            )
        if (
            self._positions is None
            or self._positions.shape[0] != q.shape[-2]
            or self._positions.device != q.device
        ):
            frames = q.shape[-2] // tokens_per_frame
            self._positions = grid_positions(self.first_frame, frames, self.grid, q.device)
        return self._positions


class BlockCausalAttend(FullAttend):
    """Attention to one's own chunk of `chunk_frames` frames and to all chunks before it."""

    def __init__(
        self, *, rope: RotaryEmbedding, grid: tuple[int, int], chunk_frames: int, first_frame: int = 0
    ) -> None:
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}.")
        super().__init__(rope=rope, grid=grid, first_frame=first_frame)
        self.chunk_frames = chunk_frames

    def mask(self, frames: Tensor) -> Tensor:
        chunks = torch.div(frames - self.first_frame, self.chunk_frames, rounding_mode="floor")
        return chunks[:, None] >= chunks[None, :]
