"""The slots of one layer that may merge: read and mapped to features, and what they become when they merge.

Legend as in `fastar.cache.merge`: N folded problems, M slots, R of them rows that may change, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastar.ann.similarity import Similarity, key_features, random_directions
from fastar.cache.allocation import Candidates, CostBy
from fastar.cache.base import CacheSpec
from fastar.cache.merge import Joins, Representative, group_medoid, rows_of
from fastar.cache.moments import Moment, expand_moment, sampled
from fastar.cache.slots import SlotFormat, Slots, unpack_positions

MatchSpace = Literal["raw", "roped"]
MergedValue = Literal["mean", "value_aware", "last"]


@dataclass(frozen=True, kw_only=True)
class MergeRules:
    """What `TempCache` was told about features and merged slots, with the sizes that go with it."""

    spec: CacheSpec
    format: SlotFormat
    similarity: Similarity
    match_space: MatchSpace
    key: Representative
    value: MergedValue
    value_weight: float
    per_head: bool
    moment: Moment
    match_width: int | None = None
    match_frames: int | None = None
    cost_by: CostBy = "features"

    @property
    def lead(self) -> tuple[int, int]:
        """Leading sizes of metadata: problems are numbered by these."""
        return (self.spec.batch, self.spec.num_heads if self.per_head else 1)

    def keys(self, slots: Slots) -> Tensor:
        """Keys [B, H, S, D] in match space, float32."""
        keys = self.format.unpack("key", slots.fields, torch.float32)
        if self.match_space == "raw":
            keys = self.spec.rope.unrotate(keys, unpack_positions(slots["position"]))
        return keys

    def values(self, slots: Slots) -> Tensor:
        """Values [B, H, S, D], float32."""
        return self.format.unpack("value", slots.fields, torch.float32)

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, S, D] -> [B * H, S, D], or [B, S, H * D] if heads share their groups."""
        return x.flatten(0, 1) if self.per_head else x.transpose(1, 2).flatten(2)

    def unfold(self, x: Tensor) -> Tensor:
        """Inverse of `fold`."""
        if self.per_head:
            return x.unflatten(0, self.lead)
        return x.unflatten(2, (self.spec.num_heads, -1)).transpose(1, 2)

    def repack(self, slots: Slots, name: str, x: Tensor, changed: Tensor) -> dict[str, Tensor]:
        """Fields of `name` with x [N, R, D] packed where `changed` [N, R, 1]; the rest is not rounded again."""
        vectors = self.unfold(x)
        if name == "key" and self.match_space == "raw":
            vectors = self.spec.rope.rotate(vectors, unpack_positions(slots["position"]))
        mask = changed.unflatten(0, self.lead)
        packed = self.format.pack(name, vectors)
        return {field: torch.where(mask, new, slots[field]) for field, new in packed.items()}


class Middle:
    """Slots that may merge, and what decides which do.

    Attributes:
        slots: M of them.
        candidates: features z = [key features; scaled value], in which merges are cheap or dear; counts; partners.
        value_scale: [N, 1, Dv], turns values into features: the variances of both parts, of a sample, become alike.
    """

    def __init__(self, slots: Slots, rules: MergeRules, moment: Tensor | None) -> None:
        """`moment`: the stored second moment of the queries, for the similarity that needs it."""
        self.slots, self.rules = slots, rules
        expanded = None if moment is None else expand_moment(moment, rules.moment, rules.spec.head_dim)
        key = key_features(rules.keys(slots), rules.similarity, query_moment=expanded)
        value = rules.values(slots)
        spread, value_spread = _variance(sampled(key)), _variance(sampled(value))
        scale = (rules.value_weight * spread / value_spread.clamp_min(1e-12)).sqrt()
        self.value_scale = rules.fold(scale[..., None, None].expand(-1, -1, 1, value.shape[-1]))
        key, value = rules.fold(key), rules.fold(value)
        width = key.shape[-1]
        features = key.new_empty(*key.shape[:2], width + value.shape[-1])
        features[..., :width] = key
        torch.mul(value, self.value_scale, out=features[..., width:])
        count, partner = slots["count"].float().flatten(0, 1), slots["partner"].long().flatten(0, 1)
        projection = None
        if rules.match_width is not None and rules.match_width < features.shape[2]:
            projection = random_directions(0, features.shape[2], rules.match_width, features.device)
        self.candidates = Candidates(
            features, count, partner, width, projection, rules.cost_by, rules.match_frames
        )

    def merged(self, root: Tensor, joins: Joins) -> tuple[dict[str, Tensor], Tensor]:
        """Fields [.., R, ...] and features [N, R, F] of the slots at `joins.place`: merged, if that is their root.

        Others, which nothing was merged into, are given as they are.
        """
        rules, candidates, width = self.rules, self.candidates, self.candidates.key_width
        before = self._at(joins.place)
        sums = self._sums(root, joins, before)
        is_merged = joins.last[..., None]
        value = sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)
        rows = rules.repack(before, "value", value, is_merged)
        features = rows_of(candidates.features, joins.place)
        features[..., width:] = torch.where(is_merged, value * self.value_scale, features[..., width:])
        if rules.key == "mean":
            key, key_feature = (x / sums[2].clamp_min(1) for x in sums[3:])
            rows.update(rules.repack(before, "key", key, is_merged))
            features[..., :width] = torch.where(is_merged, key_feature, features[..., :width])
        elif rules.key == "medoid":
            most = joins.order.shape[1]
            medoid = group_medoid(candidates.features[..., :width], root, candidates.count, most)
            chosen = medoid.gather(1, joins.place)
            features[..., :width] = rows_of(candidates.features, chosen)[..., :width]
            found = self._at(chosen).fields.items()
            rows.update({name: x for name, x in found if name.startswith("key") or name == "position"})
        return rows, features

    def _at(self, index: Tensor) -> Slots:
        """The slots at index [N, R], copied."""
        return self.slots.gather(index.unflatten(0, self.rules.lead))

    def _sums(self, root: Tensor, joins: Joins, placed: Slots) -> tuple[Tensor, ...]:
        """Sums over the groups at `joins.place`, of what `_summands` names; `placed`: the slots there."""
        weight = self._value_weights(root)
        own = self._summands(placed, joins.place, weight)
        moved = self._summands(self._at(joins.order), joins.order, weight)
        stays = (root.gather(1, joins.place) == joins.place)[..., None]
        total = torch.cat(own, -1) * stays + joins.run_sum(torch.cat(moved, -1))
        return total.split([x.shape[-1] for x in own], -1)

    def _summands(self, slots: Slots, index: Tensor, weight: Tensor) -> list[Tensor]:
        """What is summed over a group, of `slots` at index [N, R]: values by their weights, the rest by count."""
        candidates = self.candidates
        count, own = (x.gather(1, index)[..., None] for x in (candidates.count, weight))
        parts = [self.rules.fold(self.rules.values(slots)) * own, own, count]
        if self.rules.key == "mean":
            features = rows_of(candidates.features, index)[..., : candidates.key_width]
            parts += [self.rules.fold(self.rules.keys(slots)) * count, features * count]
        return parts

    def _value_weights(self, root: Tensor) -> Tensor:
        """Weights [N, M] of the members of a group in its value."""
        candidates = self.candidates
        if self.rules.value == "mean":
            return candidates.count
        if self.rules.value == "last":
            newest = torch.arange(root.shape[1], device=root.device)
            return (root == newest).to(candidates.count.dtype)
        heads = 1 if self.rules.per_head else self.rules.spec.num_heads
        energy = candidates.features[..., : candidates.key_width].square().sum(-1) / heads
        return candidates.count * (0.5 * (energy - energy.gather(1, root))).clamp(-8, 8).exp()


def _variance(x: Tensor) -> Tensor:
    """Mean squared distance to the mean over M: [B, H, M, D] -> [B, H]."""
    return (x - x.mean(2, keepdim=True)).square_().sum(-1).mean(2)
