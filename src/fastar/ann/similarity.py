"""Feature maps that turn each similarity of two keys into an inner product and a Euclidean distance.

| similarity | inner product of features | squared distance of features |
|---|---|---|
| `cosine` | cosine of the keys | 2 - 2 cosine |
| `centred` | cosine after the mean key is taken away | 2 - 2 centred cosine |
| `dot` | k_i . k_j / sqrt(d), the attention logit | E[(q . dk)^2] / d for isotropic q with |q|^2 = d sqrt(d) |
| `expected_logit_change` | E_q[(q . k_i)(q . k_j)] / d | E_q[(q . dk)^2] / d |

Raw cosine says little by itself: all keys of a layer share a mean, so even an untrained model has nearly every pair
above 0.9. The expected logit change is what a merge does to the softmax, averaged over the queries seen so far.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Similarity = Literal["cosine", "centred", "dot", "expected_logit_change"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)


def key_features(
    keys: Tensor,
    similarity: Similarity,
    *,
    query_moment: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Map keys [..., m, d] to float32 features [..., m, d] of the same width.

    Args:
        keys: before or after RoPE; the result speaks about that space.
        similarity: see the table above.
        query_moment: E[q q^T], [..., d, d], or its diagonal [..., d]; needed by `expected_logit_change`.
        mean: mean key [..., 1, d] for `centred`; the mean over m if None.
    """
    keys = keys.float()
    if similarity == "cosine":
        return torch.nn.functional.normalize(keys, dim=-1)
    if similarity == "centred":
        return torch.nn.functional.normalize(
            keys - (keys.mean(-2, keepdim=True) if mean is None else mean), dim=-1
        )
    if similarity == "dot":
        return keys * keys.shape[-1] ** -0.25
    if similarity == "expected_logit_change":
        if query_moment is None:
            raise ValueError("similarity=expected_logit_change needs the second moment of the queries")
        scale = keys.shape[-1] ** -0.5
        if query_moment.dim() < keys.dim():
            return keys * (query_moment.float().clamp_min(0).sqrt().unsqueeze(-2) * scale)
        return keys @ (moment_factor(query_moment) * scale)
    raise ValueError(f"unknown similarity {similarity!r}: choose one of {', '.join(SIMILARITIES)}")


def moment_factor(moment: Tensor) -> Tensor:
    """A factor L [..., d, d] of a second moment M = L L^T, so that x M x^T = |x L|^2.

    A small ridge (1e-4 of the mean variance) makes the moment of fewer than d queries, or a rounded one, positive
    definite.
    """
    moment = moment.float()
    ridge = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].clamp_min(1e-12) * 1e-4
    jitter = torch.diag_embed(ridge.expand(moment.shape[:-1]))
    # A moment kept in bfloat16 is off by up to 2^-9 of its largest entry, more than a small ridge may repair.
    factor, info = torch.linalg.cholesky_ex(moment + jitter)
    fallback = torch.diag_embed((moment.diagonal(dim1=-2, dim2=-1) + ridge).clamp_min(0).sqrt())
    return torch.where((info == 0)[..., None, None], factor, fallback)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # for callers of either mode
def random_directions(seed: int, width: int, number: int, device: torch.device) -> Tensor:
    """`number` orthonormal directions of `width` dimensions, float32 [width, number], drawn by seed and shape alone.

    The last few are kept, and must not be written to: a copy to the GPU in every call would make the host wait.

    Raises:
        ValueError: more directions than dimensions.
    """
    if number > width:
        raise ValueError(f"there are no {number} orthogonal directions of {width} dimensions: ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(width, number, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(plane).Q.float().contiguous().to(device)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance of a [..., n, d] to b [..., m, d] as [..., n, m], through one matrix product."""
    product = torch.baddbmm(
        b.square().sum(-1)[..., None, :].flatten(0, -3), a.flatten(0, -3), b.mT.flatten(0, -3), alpha=-2.0
    )
    return (product.unflatten(0, a.shape[:-2]) + a.square().sum(-1, keepdim=True)).clamp_min(0)
