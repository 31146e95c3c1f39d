"""How much of dense attention a method keeps, also when it merges keys.

With dense weights a_i over the original tokens and the method's weights a~_i per token (a merged slot's weight divided
by its count for each member, 0 for a dropped token), recall = sum_i min(a_i, a~_i), which is 1 minus the total
variation between the two. For a method that only selects tokens and renormalises, it is the dense mass it keeps.
The relative error of the attention output stands beside it and ranks methods better.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fastar.cache.lineage import DROPPED


def member_counts(assignment: Tensor, num_slots: int) -> Tensor:
    """Tokens in each slot: assignment int64 [..., L] of slots, `DROPPED` for none -> int64 [..., S]."""
    kept = assignment != DROPPED
    counts = torch.zeros(*assignment.shape[:-1], num_slots, dtype=torch.int64, device=assignment.device)
    return counts.scatter_add_(
        -1, assignment.clamp(min=0), kept.long()
    )  # integers: any order gives the same sum


def spread_over_members(slot_weights: Tensor, assignment: Tensor) -> Tensor:
    """Weights per original token from weights per slot.

    Args:
        slot_weights: [..., Lq, S], the method's softmax weights over its slots.
        assignment: int64 [..., L], slot of each original token or `DROPPED`; leading dimensions as the weights'.

    Returns:
        [..., Lq, L]: the slot's weight / the number of its members, 0 for dropped tokens.
    """
    num_slots = slot_weights.shape[-1]
    if assignment.dtype != torch.int64 or assignment.shape[:-1] != slot_weights.shape[:-2]:
        raise ValueError(
            f"assignment must be int64 [..., L] with the leading dimensions of slot_weights "
            f"{tuple(slot_weights.shape)}, got {assignment.dtype} {tuple(assignment.shape)}"
        )
    share = slot_weights / member_counts(assignment, num_slots).clamp(min=1).unsqueeze(-2)
    index = assignment.clamp(min=0).unsqueeze(-2).expand(*slot_weights.shape[:-1], assignment.shape[-1])
    return share.gather(-1, index) * (assignment != DROPPED).unsqueeze(-2)


def attention_recall(dense: Tensor, method: Tensor) -> Tensor:
    """sum_i min(a_i, a~_i) of weights over the same tokens, [..., Lq, L] each -> [..., Lq]."""
    if dense.shape != method.shape:
        raise ValueError(
            f"both weights must be over the same tokens, got {tuple(dense.shape)} and {tuple(method.shape)}"
        )
    return torch.minimum(dense, method).sum(-1)


def relative_output_error(out: Tensor, dense_out: Tensor) -> Tensor:
    """|out - dense| / |dense| of attention outputs [..., Lq, D], norms over queries and channels together: [...]."""
    return (out - dense_out).float().norm(dim=(-2, -1)) / dense_out.float().norm(dim=(-2, -1))


class AttentionRecall(Metric):
    """Recall per layer and its mean over layers (each layer weighs the same)."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_layers, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, layer: int, dense: Tensor, method: Tensor, assignment: Tensor | None = None) -> None:
        """Add one attention call.

        Args:
            layer: index.
            dense: dense weights over the original tokens, [..., Lq, L].
            method: the method's weights: over its slots [..., Lq, S] with `assignment`, else over the tokens.
            assignment: int64 [..., L], see `spread_over_members`.
        """
        per_token = method if assignment is None else spread_over_members(method, assignment)
        recall = attention_recall(dense, per_token)
        self.total[layer] += recall.double().sum()
        self.count[layer] += recall.numel()

    def per_layer(self) -> Tensor:
        """Mean recall of each layer, float32 [num_layers]; NaN for a layer without calls."""
        return (self.total / self.count).float()

    def compute(self) -> Tensor:
        """Mean over the layers that were seen."""
        return self.per_layer().nanmean()
