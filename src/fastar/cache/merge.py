"""Merging slots: groups of them become one, deterministically and without waiting for the device.

Legend: N folded problems (batch x heads, or batch if heads share their groups), M slots in order of age, F features.
A merge is an edge from an older slot to a newer one. `parent` [N, M] names the slot each one merges into (itself if
none), `root` where its chain of merges ends. Sums over groups are sort + segmented scan: no racing scatters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Representative = Literal["last", "mean", "medoid"]
Weighting = Literal["none", "ward", "root_ward", "older"]

_MAX_NUMBERS = 2**26  # gathered at a time in `merge_cost`


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [N, M, F] at index [N, R] along M: [N, R, F]. Moves whole rows; `gather` would move single numbers."""
    return x.flatten(0, 1).index_select(0, flat_index(index, x.shape[1])).view(*index.shape, x.shape[2])


def flat_index(index: Tensor, size: int) -> Tensor:
    """index [N, R] into M = `size` slots as rows of [N * M, ...]: int64 [N * R]."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * size).flatten()


def find_roots(parent: Tensor) -> Tensor:
    """End of every slot's chain: parent int64 [N, M] (>= own index) -> root [N, M], by log2 M pointer jumps."""
    root = parent
    for _ in range(max(1, (parent.shape[1] - 1).bit_length())):
        root = root.gather(1, root)
    return root


@dataclass
class Joins:
    """The R slots of each problem that may end in others, sorted by where they end; all [N, R].

    Attributes:
        order: the slots; those that stay fill up the end.
        moved: whether a slot ends in another one.
        target: where it ends, in ascending order; M where it stays.
        last: whether a slot is the last one with its target, at which a running sum is complete.
        place: different slots: the target for the last of each run, for others the slot itself.
    """

    order: Tensor
    moved: Tensor
    target: Tensor
    last: Tensor
    place: Tensor

    def run_sum(self, rows: Tensor) -> Tensor:
        """Sum of `rows` [N, R, F], those of `order`, over each run, at its last one; zero elsewhere."""
        rows = rows * self.moved[..., None]
        shift = 1
        while shift < self.target.shape[1]:
            same = self.target[:, shift:] == self.target[:, :-shift]
            rows[:, shift:] += (
                rows[:, :-shift] * same[..., None]
            )  # the product is formed before any row changes
            shift *= 2
        return rows.mul_(self.last[..., None])

    def add(self, total: Tensor, rows: Tensor) -> Tensor:
        """Add `rows` [N, R, F] to total [N, M, F] at `place`, in place."""
        total.flatten(0, 1).index_add_(0, flat_index(self.place, total.shape[1]), rows.flatten(0, 1))
        return total


def joins_of(root: Tensor, most: int) -> Joins:
    """The joins of root [N, M], of which at most `most` a problem are no roots."""
    count = root.shape[1]
    gone = root != torch.arange(count, device=root.device)
    target, order = torch.where(gone, root, count).sort(dim=1, stable=True)  # slots that stay come last
    target, order = target[:, :most], order[:, :most]
    last = target < count
    last[:, :-1] &= target[:, 1:] != target[:, :-1]
    return Joins(order, gone.gather(1, order), target, last, torch.where(last, target, order))


def segment_sum(x: Tensor, root: Tensor, most: int) -> Tensor:
    """Sum of x [N, M, F] over the members of each group, at the group's root; zero at other slots.

    `most` bounds the slots of a problem that are no roots. Only those rows move: sorted by root, summed by a segmented
    scan, the last of each run added to its root, where nothing else is written.
    """
    joins = joins_of(root, most)
    stays = root == torch.arange(root.shape[1], device=root.device)
    return joins.add(x * stays[..., None], joins.run_sum(rows_of(x, joins.order)))


def average_in_place(x: Tensor, root: Tensor, weight: Tensor, most: int) -> Tensor:
    """`group_mean` written over x [N, M, F] at the roots (others are spoilt); returns the groups' weight [N, M]."""
    joins, weight = joins_of(root, most), weight[..., None]
    rows = torch.cat([rows_of(x, joins.order), torch.ones_like(joins.order, dtype=x.dtype)[..., None]], -1)
    sums = joins.run_sum(rows * rows_of(weight, joins.order))
    joins.add(x.mul_(weight), sums[..., :-1])
    stays = root == torch.arange(root.shape[1], device=root.device)
    total = joins.add(weight * stays[..., None], sums[..., -1:])
    x.div_(total.clamp_min(torch.finfo(x.dtype).tiny))
    return total[..., 0]


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
    features: Tensor,
    count: Tensor,
    partner: Tensor,
    weighting: Weighting,
    first: int = 0,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Cost of merging slots into their partners: w |z_i - z_j|^2, inf where the partner is -1.

    Args:
        features: z [N, M, F].
        count: tokens a slot stands for, float [N, M].
        partner: int64 [N, R], of the slots i = first .. first + R - 1; a newer slot j or -1.
        rows: int64 [N, R], the slots i where they do not follow one another.
        weighting: see `pair_weight`.

    Returns:
        float [N, R].
    """
    target, size = partner.clamp_min(0), partner.shape[1]
    distance = count.new_empty(partner.shape)
    step = max(1, _MAX_NUMBERS // (features.shape[0] * features.shape[2]))
    for start in range(0, size, step):  # few at a time, for the sake of memory
        part = slice(start, min(start + step, size))
        difference = rows_of(features, target[:, part])
        if rows is None:
            difference -= features[:, first + part.start : first + part.stop]
        else:
            difference -= rows_of(features, rows[:, part])
        distance[:, part] = torch.linalg.vector_norm(difference, dim=-1).square()
    own = count[:, first : first + size] if rows is None else count.gather(1, rows)
    weight = pair_weight(own, count.gather(1, target), weighting)
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
