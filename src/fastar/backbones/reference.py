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
    `first_frame`. `action_rope` turns the two action streams, for a backbone that has them.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding,
        grid: tuple[int, int],
        first_frame: int = 0,
        action_rope: RotaryEmbedding | None = None,
    ) -> None:
        self.rope = rope
        self.grid = grid
        self.first_frame = first_frame
        self.action_rope = action_rope
        self._positions: Tensor | None = None

    def __call__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if stream in ("mouse", "keyboard"):
            return self._attend_actions(q, k, v)
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

    def action_mask(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """As `mask`, in the action streams, where queries [L] and keys [F] are of these absolute frames."""
        return None

    def _attend_actions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys are one a frame, queries equally many of each."""
        if self.action_rope is None:
            raise ValueError("a backbone with an action module needs its rotary embedding: pass action_rope.")
        places = grid_positions(self.first_frame, k.shape[2], (1, 1), k.device)
        of_queries = places.repeat_interleave(q.shape[2] // k.shape[2], dim=0)
        return F.scaled_dot_product_attention(
            self.action_rope.rotate(q, of_queries),
            self.action_rope.rotate(k, places),
            v,
            attn_mask=self.action_mask(of_queries[:, 0], places[:, 0]),
        )

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
    """Attention to one's own chunk of `chunk_frames` frames and to all chunks before it.

    In the action streams it goes back `action_frames` frames from the end of the chunk, at least through the chunk.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding,
        grid: tuple[int, int],
        chunk_frames: int,
        first_frame: int = 0,
        action_rope: RotaryEmbedding | None = None,
        action_frames: int = 0,
    ) -> None:
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}.")
        super().__init__(rope=rope, grid=grid, first_frame=first_frame, action_rope=action_rope)
        self.chunk_frames, self.action_frames = chunk_frames, action_frames

    def mask(self, frames: Tensor) -> Tensor:
        chunks = self._chunks(frames)
        return chunks[:, None] >= chunks[None, :]

    def action_mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        end = (self._chunks(queries) + 1) * self.chunk_frames + self.first_frame
        start = end - max(self.action_frames, self.chunk_frames)
        return (keys >= start[:, None]) & (keys < end[:, None])

    def _chunks(self, frames: Tensor) -> Tensor:
        return torch.div(frames - self.first_frame, self.chunk_frames, rounding_mode="floor")
