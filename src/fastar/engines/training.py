"""Attention with gradients, for training: the teacher-forcing mask of a causal video transformer.

A training sequence is the clip twice: `[clean | noisy]`, F frames each, both at the same positions. A clean frame
attends to the clean frames of its chunk and of earlier chunks; a noisy frame attends to its own noisy chunk and to
the clean frames of strictly earlier chunks. That is what inference does (clean history from the cache, current
chunk noisy), for all chunks of a clip in one pass.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastar.attention.context import Stream
from fastar.attention.rope import RotaryEmbedding, apply_rotation, grid_positions


class TeacherForcingAttend:
    """The `attend` of a training pass over `[clean | noisy]` sequences.

    On CUDA FlexAttention skips the masked blocks; elsewhere SDPA takes a dense boolean mask (small clips only).

    Args:
        rope: the backbone's rotary embedding.
        grid: tokens per frame as (rows, columns).
        num_frames: F, frames of the clip; a multiple of `chunk_frames`.
        chunk_frames: frames that are denoised together.
    """

    def __init__(
        self,
        rope: RotaryEmbedding,
        *,
        grid: tuple[int, int],
        num_frames: int,
        chunk_frames: int,
        device: torch.device,
    ) -> None:
        if num_frames % chunk_frames:
            raise ValueError(
                f"a clip of {num_frames} frames is not a whole number of {chunk_frames}-frame chunks"
            )
        self.rope, self.grid, self.num_frames = rope, grid, num_frames
        chunk_tokens = chunk_frames * grid[0] * grid[1]
        clip_tokens = num_frames * grid[0] * grid[1]

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query_chunk, key_chunk = (
                (query % clip_tokens) // chunk_tokens,
                (key % clip_tokens) // chunk_tokens,
            )
            key_is_clean, query_is_clean = key < clip_tokens, query < clip_tokens
            history = key_is_clean & (key_chunk < query_chunk)
            same_chunk = (key_is_clean == query_is_clean) & (key_chunk == query_chunk)
            return history | same_chunk

        length = 2 * clip_tokens
        self.block_mask: BlockMask | None = None
        self.dense_mask: Tensor | None = None
        if device.type == "cuda":
            self.block_mask = create_block_mask(visible, None, None, length, length, device=device)
        else:
            index = torch.arange(length, device=device)
            self.dense_mask = visible(index, index, index[:, None], index[None, :])
        self.device = device
        self.place(first_frame=0)

    def place(self, first_frame: int) -> None:
        """Set the absolute index of the clip's first frame (drawn at random in training)."""
        positions = grid_positions(first_frame, self.num_frames, self.grid, device=self.device)
        cos, sin = self.rope.tables(positions)
        self.cos, self.sin = torch.cat([cos, cos]), torch.cat([sin, sin])

    def __call__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q, k, v are [B, H, L, D] before RoPE, L = 2 F tokens for the self stream."""
        if stream in ("mouse", "keyboard"):
            raise ValueError("backbones with an action module cannot be trained: their mask is not made here")
        if stream != "self":
            return functional.scaled_dot_product_attention(q, k, v)
        q, k = apply_rotation(q, (self.cos, self.sin)), apply_rotation(k, (self.cos, self.sin))
        if self.block_mask is None:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.dense_mask)
        out = flex_attention(q, k, v, block_mask=self.block_mask)
        assert isinstance(out, Tensor)
        return out
