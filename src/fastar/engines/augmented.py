"""The augmented head: a per-key additive logit carried by extra head coordinates, for kernels that know no
bias.

With q' = [q, 1, 1] and k' = [k, hi, lo], hi + lo = sqrt(D) * log m, and the softmax scale of the original
head, q'.k' / sqrt(D) = q.k / sqrt(D) + log m. The split over two numbers keeps 16 bits of mantissa in
bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = 2  # coordinates that carry the bias

# Coordinate of an empty slot, in place of -inf: inf * 0 and inf - inf would be nan inside a kernel. It fits
# every storage dtype (float16 ends at 65504), and -30000 / sqrt(D) lies below any real logit by more than exp
# can express.
EMPTY = -30000.0


def augmented_width(head_dim: int, multiple: int) -> int:
    """Head width that holds `head_dim` and the bias, rounded up to what the kernel wants."""
    return -(-(head_dim + EXTRA) // multiple) * multiple


def augment_queries(q: Tensor, width: int) -> Tensor:
    """[..., Lq, D] -> [..., Lq, width]: ones where keys carry the bias, zeros in the padding."""
    extended = pad_width(q, width)
    extended[..., q.shape[-1] : q.shape[-1] + EXTRA] = 1
    return extended


def augment_keys(k: Tensor, log_count: Tensor, width: int) -> Tensor:
    """[..., Lk, D] and log-counts [..., Lk] -> [..., Lk, width] in k's dtype."""
    extended = pad_width(k, width)
    write_log_counts(extended, log_count, k.shape[-1])
    return extended


def write_log_counts(k: Tensor, log_count: Tensor, head_dim: int) -> None:
    """Put log-counts [..., Lk] into augmented keys [..., Lk, width] of heads of `head_dim`, in place."""
    bias = log_count.to(torch.float32) * head_dim**0.5
    bias = torch.where(bias == -torch.inf, EMPTY, bias)
    hi = bias.to(k.dtype)
    k[..., head_dim] = hi
    k[..., head_dim + 1] = (bias - hi.to(torch.float32)).to(k.dtype)


def pad_width(x: Tensor, width: int) -> Tensor:
    """[..., L, D] -> a new contiguous [..., L, width], zeros behind D."""
    padded = x.new_empty(*x.shape[:-1], width)
    padded[..., : x.shape[-1]] = x
    padded[..., x.shape[-1] :] = 0
    return padded
