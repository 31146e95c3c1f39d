"""Second moment of the queries seen so far: what turns a key difference into an expected logit change."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Moment = Literal["full", "diagonal"]

_SAMPLE = 1024


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
    row = torch.arange(head_dim, device=stored.device)
    high, low = torch.maximum(row[:, None], row), torch.minimum(row[:, None], row)
    place = high * (high + 1) // 2 + low  # in the lower triangle, row by row
    return stored.float()[..., place]


def sampled(x: Tensor) -> Tensor:
    """x [B, H, M, D] at every n-th slot, 1,024 or a little more: enough for a mean and a variance."""
    return x[:, :, :: max(1, x.shape[2] // _SAMPLE)]


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.tril_indices(size, size, device=device).unbind(0)
    return row, column
