"""Slots of heads that have unequally many, in memory that they share, where one call of attention can read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastar.cache.base import CacheSpec, StoredView
from fastar.cache.budget import BudgetedPolicy
from fastar.cache.slots import SlotFormat, Slots


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer and the policy that serves them."""

    layer: int
    heads: list[int]
    policy: BudgetedPolicy


class LayerRows:
    """The packed keys and values of a layer as rows [1, 1, R, ...]: each head's slots one after the other, with room.

    Policies go on with the same slots at their new place.

    Args:
        groups: of the layer, all with slots of `format` and with memory that does not grow.
        spec: of all heads.
    """

    def __init__(self, groups: Sequence[HeadGroup], format: SlotFormat, spec: CacheSpec) -> None:
        self.groups, self.format, self.device = groups, format, spec.device
        self.batch, self.heads = spec.batch, spec.num_heads
        self.starts, first, total = [], torch.zeros(self.batch, self.heads, dtype=torch.int64), 0
        for group in groups:
            size, own = group.policy.buffers[0].size, len(group.heads)
            self.starts.append(total)
            first[:, group.heads] = total + size * torch.arange(self.batch * own).view(self.batch, own)
            total += size * self.batch * own
        self.first, self.total = first.to(self.device), total
        names = list(format.pack("key", torch.zeros(1, format.group)))
        names += [name.replace("key", "value") for name in names]
        kept = groups[0].policy.buffers[0]
        self.slots = Slots({name: kept[name].new_zeros(1, 1, total, kept[name].shape[3]) for name in names})
        for group, start in zip(groups, self.starts, strict=True):
            buffers = group.policy.buffers
            places = {}
            for name in names:
                shape = buffers[0][name].shape
                rows = self.slots[name][0, 0, start : start + shape[:3].numel()]
                places[name] = rows.view(shape)
            buffers.move(places)

    def stored(self) -> StoredView:
        """What attention reads."""
        views = [group.policy.stored(0) for group in self.groups]
        lengths = torch.zeros(self.batch, self.heads, dtype=torch.int32)
        counts = None
        if any(view.log_count is not None for view in views):
            counts = torch.zeros(1, 1, self.total, device=self.device)
        for group, start, view in zip(self.groups, self.starts, views, strict=True):
            lengths[:, group.heads] = view.slots.size
            if counts is not None and view.log_count is not None:
                shape = group.policy.buffers[0]["key"].shape[:3]
                place = counts[0, 0, start : start + shape.numel()].view(shape)
                place[:, :, : view.slots.size] = view.log_count
        longest = max(view.slots.size for view in views)
        return StoredView(self.slots, self.format, counts, self.first, lengths.to(self.device), longest)
