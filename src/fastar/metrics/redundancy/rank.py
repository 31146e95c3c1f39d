"""Effective rank: in how many directions a cache spreads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.metrics.redundancy.means import MeanTable
from fastar.metrics.redundancy.top_entries import entropy


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007) of x [..., S, D]: [...].

    From 1 (all rows in proportion) to min(S, D) (orthogonal rows of one length). Singular values come from the D x D
    Gram matrix, in float64.
    """
    x = x.double()
    values = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0).sqrt()
    return entropy(values / values.sum(-1, keepdim=True).clamp(min=1e-300)).exp()


class EffectiveRank(MeanTable):
    """Effective rank of what a cache holds: [layers, heads].

    Args:
        num_layers, num_heads: of the backbone.
        centred: of the vectors less their mean, which every key of a head has in common.
    """

    def __init__(self, num_layers: int, num_heads: int, *, centred: bool = False) -> None:
        super().__init__(num_layers, num_heads)
        self.centred = centred

    def update(self, layer: int, x: Tensor, live: Tensor) -> None:
        """Add a layer's vectors [B, H, S, D]; bool `live` [B, H, S] says which slots are not empty."""
        weight = live[..., None].to(x.dtype)
        if self.centred:
            x = x - (x * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
        self._add(layer, effective_rank(x * weight).sum(0), x.shape[0])
