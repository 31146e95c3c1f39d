"""Which slots merge: partners, the cheapest merges, and partners again (the plan of `TempCache`, no storage in sight).

Legend as in `fastar.cache.merge`: N problems, M slots oldest first, F features; `partner` int64 [N, M] is the newer
slot that a slot would merge into at least cost, or -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastar.ann.base import Matcher
from fastar.ann.exact import ExactMatcher
from fastar.cache.merge import (
    Weighting,
    average_in_place,
    cheapest,
    find_roots,
    merge_cost,
    rows_of,
)

CostBy = Literal["features", "searched"]


@dataclass
class Candidates:
    """Slots that may merge: features z [N, M, F], of which the first `key_width` speak of keys; counts and partners.

    A search compares z, or z `projection` [F, W]; costs are of z, or of what is searched by. What enters is found by
    others in its newest `match_frames` frames alone, if not None.
    """

    features: Tensor
    count: Tensor  # float [N, M]
    partner: Tensor
    key_width: int
    projection: Tensor | None = None
    cost_by: CostBy = "features"
    match_frames: int | None = None

    def priced(self, features: Tensor) -> Tensor:
        """What costs are of, of `features` [N, R, F]."""
        return self.searched(features) if self.cost_by == "searched" else features

    def searched(self, features: Tensor) -> Tensor:
        """What a search compares of `features` [N, R, F]."""
        return features if self.projection is None else features @ self.projection


def match(
    slots: Candidates, known: int, frame: int, matcher: Matcher, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Best newer partner and its cost, both [N, M], now that the slots from index `known` on have entered.

    Slots entered in frames of `frame` tokens; a slot is matched to later frames only, never within its own.
    """
    features, count, size = slots.features, slots.count, slots.features.shape[1]
    searched, priced = slots.searched(features), slots.priced(features)
    partner = torch.where(slots.partner < known, slots.partner, -1)  # others pointed at frames dropped since
    cost = merge_cost(priced, count, partner, weighting)
    # older slots against all that entered, then what entered against its later frames
    oldest = known if slots.match_frames is None else max(known, size - slots.match_frames * frame)
    blocks = [(0, known, oldest, size)] if known else []
    blocks += [(known, low, low, low + frame) for low in range(known + frame, size, frame) if low >= oldest]
    for first, last, low, high in blocks:
        found, _ = matcher.nearest(searched[:, first:last], searched[:, low:high], metric="euclidean")
        found = torch.where(found < 0, -1, found + low)
        found_cost = merge_cost(priced, count, found, weighting, first)
        better = found_cost < cost[:, first:last]
        partner[:, first:last] = torch.where(better, found, partner[:, first:last])
        cost[:, first:last] = torch.where(better, found_cost, cost[:, first:last])
    return partner, cost


def choose(
    slots: Candidates, cost: Tensor, surplus: int, rounds: int, weighting: Weighting, *, keep_last_key: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick `surplus` merges of least cost in `rounds` steps, costs brought up to date between them.

    Args:
        slots: with their partners.
        cost: of merging into the partner, [N, M].
        keep_last_key: whether a merged slot keeps the key features of its newest member or gets their mean.

    Returns:
        root: int64 [N, M], the slot each one ends in. gone: bool [N, M], exactly `surplus` a row, slots that ended in
        another one, or were dropped for want of a partner. partner: moved along to the roots.
    """
    features, count, partner = slots.features, slots.count, slots.partner
    own = torch.arange(count.shape[1], device=count.device).expand_as(partner)
    root, gone = own, torch.zeros_like(partner, dtype=torch.bool)
    done = [surplus * step // rounds for step in range(rounds + 1)]
    for left, (before, after) in enumerate(pairwise(done), start=1 - rounds):
        # A slot that no search found a partner for costs inf: it is dropped, oldest first, if merges run out.
        chosen = cheapest(cost.masked_fill(gone, torch.nan), after - before)  # nan sorts behind inf
        step = find_roots(torch.where(chosen & (partner >= 0), partner, own))
        root, gone = step.gather(1, root), gone | chosen
        partner = torch.where(partner < 0, -1, step.gather(1, partner.clamp_min(0)))
        if left:
            if features is slots.features:
                features = features.clone()
            kept = slots.key_width if keep_last_key else 0
            count = average_in_place(features[..., kept:], step, count, after - before)
            cost = merge_cost(slots.priced(features), count, partner, weighting)
    return root, gone, partner


def renew(
    slots: Candidates,
    before: Tensor,
    number: int,
    frame: int,
    weighting: Weighting,
    matcher: Matcher | None = None,
) -> Tensor:
    """Search the nearest newer slot anew, exactly, for the `number` slots whose partner became dearest.

    Args:
        slots: after the merges.
        before: cost [N, M] of each slot's partner before them.
        number: slots a problem.
        frame: tokens of the newest frame, which has no newer partner.
        weighting: see `fastar.cache.merge.pair_weight`.
        matcher: searches among all newer slots; None for `ExactMatcher`.

    Returns:
        partner [N, M], the cheaper one of found and old.
    """
    features, count, partner = slots.features, slots.count, slots.partner
    priced = slots.priced(features)
    cost = merge_cost(priced, count, partner, weighting)
    worse = torch.where(partner < 0, torch.inf, cost - before)
    worse[:, -frame:].fill_(-torch.inf)
    rows = worse.argsort(dim=1, descending=True, stable=True)[:, :number]
    not_newer = (torch.zeros_like(rows), rows + 1)
    search = ExactMatcher() if matcher is None else matcher
    searched = slots.searched(features)
    index, _ = search.nearest(rows_of(searched, rows), searched, excluded=not_newer, metric="euclidean")
    better = merge_cost(priced, count, index, weighting, rows=rows) < cost.gather(1, rows)
    return partner.scatter(1, rows, torch.where(better, index, partner.gather(1, rows)))
