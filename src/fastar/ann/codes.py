"""Buckets of vectors: signs of projections as one number, or the nearest centroid; on a GPU in one trip over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS, WIDTH = 64, 64  # vectors of a program, and how many of their numbers it multiplies at a time
MOST = 256  # centroids that the kernel holds


def sign_codes(x: Tensor, planes: Tensor, centre: Tensor | None = None) -> Tensor:
    """Sides of hyperplanes [d, bits] on which x [N, n, d] lies, about `centre` [N, 1, d], as bits: int64 [N, n]."""
    if x.device.type == "cuda":
        return fused_sign_codes(x, planes, centre)
    return codes_of((x if centre is None else x - centre) @ planes)


def nearest_codes(x: Tensor, centroids: Tensor, centre: Tensor) -> Tensor:
    """Nearest of centroids float32 [N, c, d] to x [N, n, d] about `centre` [N, 1, d]: int64 [N, n]."""
    if x.device.type == "cuda" and centroids.shape[1] <= MOST:
        return fused_nearest_codes(x, centroids, centre)
    return nearest_of((x - centre).float(), centroids)


def nearest_of(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest of centroids [N, c, d] to x [N, n, d], one dtype: int64 [N, n]. What all distances of a row share is left
    out."""
    offset = centroids.square().sum(-1)[:, None] * -0.5
    return torch.baddbmm(offset, x, centroids.mT).argmax(-1)


def fused_sign_codes(x: Tensor, planes: Tensor, centre: Tensor | None = None) -> Tensor:
    """`sign_codes` in one kernel, on a GPU or in Triton's interpreter."""
    offset = torch.zeros(len(x), planes.shape[1], device=x.device)
    if centre is not None:
        offset = -(centre.float() @ planes.float()).squeeze(1)
    return _launch(x, planes.T.contiguous().expand(len(x), -1, -1), offset, signs=True)


def fused_nearest_codes(x: Tensor, centroids: Tensor, centre: Tensor) -> Tensor:
    """`nearest_codes` in one kernel, on a GPU or in Triton's interpreter; centroids are rounded to x's dtype."""
    # of |x - m - c|^2 what differs between centroids: x.c - (m.c + |c|^2 / 2)
    rounded = centroids.to(x.dtype)
    exact = rounded.float()
    offset = -(exact * (centre.float() + exact / 2)).sum(-1)
    return _launch(x, rounded, offset, signs=False)


def codes_of(side: Tensor) -> Tensor:
    """Signs [..., bits] as one integer [...]."""
    return ((side > 0).long() << torch.arange(side.shape[-1], device=side.device)).sum(-1)


def columns_for(count: int) -> int:
    """Columns of the kernel's tile for so many vectors."""
    return max(16, 1 << (count - 1).bit_length())


def _launch(x: Tensor, vectors: Tensor, offset: Tensor, *, signs: bool) -> Tensor:
    problems, length, width = x.shape
    count = vectors.shape[1]
    out = torch.empty(problems, length, dtype=torch.int64, device=x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if vectors.stride(0) != 0:
        vectors = vectors.contiguous()
    _kernel()[(-(-length // ROWS), problems)](
        x, vectors, offset.contiguous(), out, length, count, *x.stride()[:2], vectors.stride(0),
        D=width, WIDTH=WIDTH, ROWS=ROWS, COUNT=columns_for(count), SIGNS=signs, UPCAST=x.device.type != "cuda",
    )  # fmt: skip
    return out


def _kernel() -> Any:
    # imported late: Triton is an optional package
    from fastar.ann.bucket_kernels import codes

    return codes
