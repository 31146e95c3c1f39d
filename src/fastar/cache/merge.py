"""Merging slots: groups of them become one, deterministically and without waiting for the device.

Legend: N folded problems (batch x heads, or batch if heads share their groups), M slots in order of age, F features.
A merge is an edge from an older slot to a newer one. `parent` [N, M] names the slot each one merges into (itself if
none), `root` where its chain of merges ends. Sums over groups are sort + segmented scan: no racing scatters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Representative = Literal["last", "mean", "medoid"]
Weighting = Literal["none", "ward", "root_ward", "older"]


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [N, M, F] at index [N, R] along M: [N, R, F]. Moves whole rows; `gather` would move single numbers."""
    offset = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(*index.shape, x.shape[2])


def find_roots(parent: Tensor) -> Tensor:
    """End of every slot's chain: parent int64 [N, M] (>= own index) -> root [N, M], by log2 M pointer jumps."""
    root = parent
    for _ in range(max(1, (parent.shape[1] - 1).bit_length())):
        root = root.gather(1, root)
    return root


def segment_sum(x: Tensor, root: Tensor, most: int) -> Tensor:
    """Sum of x [N, M, F] over the members of each group, at the group's root; zero at other slots.

    `most` bounds the slots of a problem that are no roots. Only those rows move: sorted by root, summed by a segmented
    scan, the last of each run added to its root, where nothing else is written.
    """
    problems, count = root.shape
    gone = root != torch.arange(count, device=root.device)
    target, order = torch.where(gone, root, count).sort(
        dim=1, stable=True
    )  # slots that stay come last, as `count`
    target, order = target[:, :most], order[:, :most]
    rows = rows_of(x, order) * gone.gather(1, order)[..., None]
    shift = 1
    while shift < most:
        same = target[:, shift:] == target[:, :-shift]
        rows = torch.cat([rows[:, :shift], rows[:, shift:] + rows[:, :-shift] * same[..., None]], 1)
        shift *= 2
    last = target < count
    last[:, :-1] &= target[:, 1:] != target[:, :-1]
    place = torch.where(last, target, order) + torch.arange(problems, device=root.device)[:, None] * count
    total = (x * ~gone[..., None]).flatten(0, 1)
    return total.index_add_(0, place.flatten(), (rows * last[..., None]).flatten(0, 1)).view_as(x)


def group_mean(x: Tensor, root: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Mean of x [N, M, F] over each group, weighted by weight [N, M] >= 0, and the group's weight [N, M], at its root.

    Other slots, and groups without weight, have mean 0. `most`: see `segment_sum`.
    """
    summed = segment_sum(torch.cat([x * weight[..., None], weight[..., None]], -1), root, most)
    return summed[..., :-1] / summed[..., -1:].clamp_min(torch.finfo(x.dtype).tiny), summed[..., -1]


def group_medoid(x: Tensor, root: Tensor, weight: Tensor, most: int) -> Tensor:
    """Member of each group nearest to its weighted mean, as an index int64 [N, M] at its root (the newest of equals).

    Other slots name themselves. `most`: see `segment_sum`.
    """
    mean = rows_of(group_mean(x, root, weight, most)[0], root)
    distance = (x - mean).square().sum(-1)
    # by root, then by distance, farthest first; the last of each run is the medoid
    by_distance = distance.argsort(dim=1, descending=True, stable=True)
    order = by_distance.gather(1, root.gather(1, by_distance).argsort(dim=1, stable=True))
    sorted_root = root.gather(1, order)
    last = torch.ones_like(sorted_root, dtype=torch.bool)
    last[:, :-1] = sorted_root[:, 1:] != sorted_root[:, :-1]
    own = torch.arange(root.shape[1], device=root.device).expand_as(root)
    spare = root.shape[1]  # losers write to a column that is cut off, so no two writes of interest collide
    chosen = torch.cat([own, own[:, :1]], 1).scatter(1, torch.where(last, sorted_root, spare), order)
    return chosen[:, :-1]


def merge_cost(
    features: Tensor, count: Tensor, partner: Tensor, weighting: Weighting, first: int = 0
) -> Tensor:
    """Cost of merging slots into their partners: w |z_i - z_j|^2, inf where the partner is -1.

    Args:
        features: z [N, M, F].
        count: tokens a slot stands for, float [N, M].
        partner: int64 [N, R], of the slots i = first .. first + R - 1; a newer slot j or -1.
        weighting: see `pair_weight`.

    Returns:
        float [N, R].
    """
    rows, target = slice(first, first + partner.shape[1]), partner.clamp_min(0)
    distance = torch.linalg.vector_norm(features[:, rows] - rows_of(features, target), dim=-1).square()
    weight = pair_weight(count[:, rows], count.gather(1, target), weighting)
    return (weight * distance).masked_fill(partner < 0, torch.inf)


def pair_weight(older: Tensor, newer: Tensor, weighting: Weighting) -> Tensor:
    """Weight of merging `older` tokens into `newer` ones (counts that broadcast).

    `none`: 1. `ward`: m_i m_j / (m_i + m_j), the growth of the sum of squares about group means, and `root_ward` its
    square root. `older`: m_i, what moves when the newer key stays.
    """
    if weighting in ("ward", "root_ward"):
        ward = older * newer / (older + newer).clamp_min(1)
        return ward.sqrt() if weighting == "root_ward" else ward
    return older if weighting == "older" else torch.ones_like(older)


def cheapest(cost: Tensor, number: int) -> Tensor:
    """bool [N, M]: the `number` lowest costs of each row; of equals the older ones."""
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    return chosen.scatter_(1, cost.argsort(dim=1, stable=True)[:, :number], True)
