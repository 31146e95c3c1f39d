"""Second moment of the queries seen so far: what turns a key difference into an expected logit change."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Moment = Literal["full", "diagonal"]


def moment_shape(kind: Moment, batch: int, heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of a stored moment: the lower triangle (the rest is its mirror image), or the diagonal."""
    return (batch, heads, head_dim if kind == "diagonal" else head_dim * (head_dim + 1) // 2)


def query_moment(queries: Tensor, kind: Moment) -> Tensor:
    """E[q q^T] over the L queries [B, H, L, D], stored as `moment_shape` says, float32."""
    queries = queries.float()
    if kind == "diagonal":
        return queries.square().mean(2)
    return pack_moment(queries.mT @ queries / queries.shape[2])


def pack_moment(moment: Tensor) -> Tensor:
    """A full moment [B, H, D, D] as it is stored: its lower triangle."""
    row, column = _triangle(moment.shape[-1], moment.device)
    return moment[..., row, column]


def expand_moment(stored: Tensor, kind: Moment, head_dim: int) -> Tensor:
    """The moment as [B, H, D, D], or its diagonal [B, H, D], float32."""
    if kind == "diagonal":
        return stored.float()
    row, column = _triangle(head_dim, stored.device)
    full = stored.new_zeros(*stored.shape[:2], head_dim, head_dim, dtype=torch.float32)
    full[..., row, column] = stored.float()
    full[..., column, row] = stored.float()
    return full


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.tril_indices(size, size, device=device).unbind(0)
    return row, column
