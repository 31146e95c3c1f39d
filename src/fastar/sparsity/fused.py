"""How the kernels of `fastar.sparsity.kernels` are launched: parts of plan making in one trip each, on a GPU or in
Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 32  # tokens of a block at a time
BLOCKS = 64  # blocks of keys a program
OTHERS = 16  # blocks that all of a row are held against at a time


def shared_pairs(
    starts: Tensor,
    ends: Tensor,
    wildcards: Tensor | None,
    num_keys: int,
    current: int,
    block_q: int,
    block_k: int,
) -> Tensor:
    """As `fastar.sparsity.blocks.shared_pairs`, of places int32 [B, H, Lq] in the sorted buckets; int32."""
    batch, heads, length = starts.shape
    blocks = (-(-length // block_q), -(-num_keys // block_k))
    out = torch.empty(batch, heads, *blocks, dtype=torch.int32, device=starts.device)
    _kernels().shared_pairs[(blocks[0], -(-blocks[1] // BLOCKS), batch * heads)](
        starts.contiguous(), ends.contiguous(), (ends if wildcards is None else wildcards).contiguous(), out,
        length, *blocks, current, Q=block_q, K=block_k, ROWS=ROWS, BLOCKS=BLOCKS, WILDCARDS=wildcards is not None,
    )  # fmt: skip
    return out


def block_means(x: Tensor, order: Tensor, live: Tensor, size: int) -> Tensor:
    """Means float32 [B, H, blocks, D] of blocks of `size` tokens of x [B, H, L, D] in `order`, of the first `live`."""
    batch, heads, length, width = x.shape
    blocks = -(-length // size)
    out = torch.empty(batch, heads, blocks, width, device=x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    _kernels().block_means[(blocks, batch * heads)](
        x, order.contiguous(), live.contiguous(), out, length, heads, blocks, *x.stride()[:3],
        D=width, WIDTH=1 << (width - 1).bit_length(), SIZE=size, ROWS=ROWS,
    )  # fmt: skip
    return out


def choose_blocks(
    scores: Tensor, live: Tensor, quotas: Tensor, current: int, block_k: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `fastar.sparsity.blocks.choose_blocks`, given how many to choose of each number of blocks: mask and lists."""
    batch, heads, *blocks = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    indices = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    _kernels().choose_blocks[(blocks[0], batch * heads)](
        scores.float().contiguous(), live.contiguous(), quotas, mask.view(torch.uint8), counts, indices, *blocks,
        current, K=block_k, BLOCKS=columns_for(blocks[1]), OTHERS=OTHERS,
    )  # fmt: skip
    return mask, (counts, indices)


def columns_for(blocks: int) -> int:
    """Columns of the tile of a row of so many blocks."""
    return max(16, 1 << (blocks - 1).bit_length())


def _kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.sparsity import kernels

    return kernels
