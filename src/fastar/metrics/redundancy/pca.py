"""Principal components of queries and keys over frames (the paper's figure 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(x: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Coordinates of x [n, D] along its first principal components, and their shares of its variance.

    Returns:
        [n, count], scaled so that the largest is 1 along each component, signs such that it is positive; [count].
    """
    x = x.double() - x.double().mean(0)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    along = x @ directions[:count].T
    extremes = along.gather(0, along.abs().argmax(0, keepdim=True))
    shares = sizes.square() / sizes.square().sum()
    return (along / extremes.where(extremes != 0, torch.ones_like(extremes))).float(), shares[:count].float()
