"""TempCache under a hard budget: when the cache is full, the cheapest pairs of slots merge, old with old included.

The paper (section 1, "TempCache") merges keys that correspond across frames into one slot with the newest key, the mean
value and a logit bias log m; attention is unchanged if the merged keys are equal (lemma). Here the number of slots is
fixed instead of a threshold: of all slots, the merges that cost least are done, exactly as many as tokens arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from fastar.ann.base import Matcher
from fastar.ann.exact import ExactMatcher
from fastar.ann.similarity import SIMILARITIES, Similarity, key_features
from fastar.cache.allocation import Candidates, choose, match, renew
from fastar.cache.base import Staged, check_choice
from fastar.cache.budget import BudgetedPolicy, BudgetOptions
from fastar.cache.merge import Representative, Weighting, group_medoid, rows_of, segment_sum
from fastar.cache.moments import Moment, expand_moment, moment_shape, query_moment
from fastar.cache.slots import Slots, take, unpack_positions

MatchSpace = Literal["raw", "roped"]
_MAX_COUNT = torch.iinfo(torch.int16).max


@dataclass
class Middle:
    """The slots that may merge, folded to N problems (see `fastar.cache.merge`), with what decides which do."""

    key: Tensor  # [N, M, Dk] in match space
    value: Tensor  # [N, M, Dv]
    key_features: Tensor  # [N, M, Fk]
    value_scale: Tensor  # [N, 1, Dv], turns values into features
    count: Tensor  # float [N, M]
    partner: Tensor  # int64 [N, M], newer slot of least cost, or -1

    def candidates(self) -> Candidates:
        """Features z = [key features; scaled value], the space in which merges are cheap or dear."""
        features = torch.cat([self.key_features, self.value * self.value_scale], -1)
        return Candidates(features, self.count, self.partner, self.key_features.shape[-1])


class TempCache(BudgetedPolicy):
    """Global merging under a byte budget.

    Every slot remembers its best newer partner. Arrivals are matched against all slots; then as many merges as there
    are slots too many are done, cheapest first, in a few rounds, with chains of merges resolved to their newest member;
    partners that became dear by that are searched anew. The cost of a merge is
    w_ij (|dk|^2 + value_weight |dv|^2 var(k) / var(v)), where |dk|^2 is the distance of `similarity`: by default the
    expected squared logit change E_q[(q . dk)^2] / d over the queries seen so far. The variances, over the slots of a
    head, make both terms alike. Merging is between frames: a token never merges into one of its own frame on arrival.

    Metadata of a slot: position 4 bytes, count 2 (saturates at 32,767), partner 2 or 4; of a layer: the query moment.

    Args:
        similarity: what makes keys alike, see `fastar.ann.similarity`.
        match_space: compare keys after RoPE as attention does, or before it (`raw`: content alone, whatever the
            position; the merged key still keeps its own position).
        key: which key stands for a group: the count-weighted `mean` (in match space; of roped keys it keeps the
            logits' mean for every query), the newest (`last`, the paper), or the member nearest to the mean (`medoid`).
        value: count-weighted `mean`, or `value_aware`: weights also grow with the attention that a member's
            key would draw from Gaussian queries, exp(E[(q . k)^2] / 2d).
        log_count: add log m to the logits of merged slots.
        value_weight: weight of the value change in the cost.
        weighting: w_ij, see `fastar.cache.merge.pair_weight`.
        per_head: merge in every head separately, or the same slots in all heads (costs are summed; less metadata).
        sink_frames: first frames that never take part in a merge.
        recent_frames: newest frames that never do; None for as many whole chunks as `recent_share` of the slots holds.
        recent_share: used if `recent_frames` is None.
        rounds: in how many steps the merges of a commit are done; costs are brought up to date between them.
        refresh: partners searched anew at each commit, as a multiple of the tokens that arrive.
        moment: `full` second moment of the queries, or its `diagonal`.
        moment_horizon: blocks (of `chunk_frames`) that the running moment averages over.
        matcher: how an arrival's partners are found; exact by default.
        budget: see `BudgetedPolicy`.
    """

    def __init__(
        self,
        *,
        similarity: Similarity = "expected_logit_change",
        match_space: MatchSpace = "roped",
        key: Representative = "mean",
        value: Literal["mean", "value_aware"] = "mean",
        log_count: bool = True,
        value_weight: float = 1.0,
        weighting: Weighting = "root_ward",
        per_head: bool = True,
        sink_frames: int = 0,
        recent_frames: int | None = None,
        recent_share: float = 0.5,
        rounds: int = 2,
        refresh: float = 0.5,
        moment: Moment = "full",
        moment_horizon: int = 64,
        matcher: Matcher | None = None,
        **budget: Unpack[BudgetOptions],
    ) -> None:
        super().__init__(**budget)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("match_space", match_space, ("raw", "roped"))
        check_choice("key", key, ("last", "mean", "medoid"))
        check_choice("value", value, ("mean", "value_aware"))
        check_choice("weighting", weighting, ("none", "ward", "root_ward", "older"))
        check_choice("moment", moment, ("full", "diagonal"))
        if min(sink_frames, recent_frames or 0, value_weight, refresh) < 0 or min(rounds, moment_horizon) < 1:
            raise ValueError(
                "sink_frames, recent_frames, value_weight and refresh must not be negative, rounds and moment_horizon "
                f"at least 1; got {sink_frames}, {recent_frames}, {value_weight}, {refresh}, {rounds}, {moment_horizon}"
            )
        if not 0 <= recent_share < 1:
            raise ValueError(f"recent_share must be at least 0 and below 1, got {recent_share}")
        self.similarity, self.match_space, self.key, self.value = similarity, match_space, key, value
        self.log_count, self.value_weight, self.weighting = log_count, value_weight, weighting
        self.per_head, self.sink_frames = per_head, sink_frames
        self.recent_frames, self.recent_share = recent_frames, recent_share
        self.rounds, self.refresh, self.moment, self.moment_horizon = rounds, refresh, moment, moment_horizon
        self.matcher = ExactMatcher() if matcher is None else matcher

    # -- what a slot and a layer keep ----------------------------------------------------------------------------

    def metadata_shape(self) -> tuple[int, int]:
        return (self.spec.batch, self.spec.num_heads if self.per_head else 1)

    def metadata(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        # An index needs 4 bytes where a budget holds more slots than int16 can number; both are tried against the
        # budget in tokens of keys and values alone, which bounds the number of slots from above.
        payload = 2 * self.spec.num_layers * self.spec.batch * self.spec.num_heads * self.spec.head_dim
        wide = self.total_budget() * 8 // (payload * self._format.bits) > _MAX_COUNT // 2
        return {
            "count": torch.ones(shape, dtype=torch.int16, device=device),
            "partner": torch.full(shape, -1, dtype=torch.int32 if wide else torch.int16, device=device),
        }

    def new_extras(self) -> dict[str, Tensor]:
        if self.similarity != "expected_logit_change":
            return {}
        shape = moment_shape(self.moment, self.spec.batch, self.spec.num_heads, self.spec.head_dim)
        return {
            "moment": torch.zeros(shape, dtype=torch.bfloat16, device=self.spec.device),
            "observed": torch.zeros(1, device=self.spec.device),
        }

    def verbatim_slots(self) -> int:
        if self.recent_frames is not None:
            return self.recent_frames * self.spec.tokens_per_frame
        chunk = self.spec.chunk_frames * self.spec.tokens_per_frame
        room = self.capacity_slots() - self._least_slots()
        return max(0, min(int(self.recent_share * self.capacity_slots()), room)) // chunk * chunk

    def reserved_slots(self) -> int:
        return self._least_slots() + (self.recent_frames or 0) * self.spec.tokens_per_frame

    def _least_slots(self) -> int:
        # the newest frame of the middle has no partner yet, so one frame of room guarantees enough merges
        return (self.sink_frames + 1) * self.spec.tokens_per_frame

    def _log_count(self, slots: Slots) -> Tensor | None:
        seen = (self.next_frame - self.first_frame) * self.spec.tokens_per_frame
        if not self.log_count or seen <= self.filled:
            return None  # nothing has been merged yet
        return slots["count"].float().log().expand(self.spec.batch, self.spec.num_heads, -1)

    # -- a commit ------------------------------------------------------------------------------------------------

    def absorb(
        self, layer: int, slots: Slots, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Slots:
        self._observe(staged, extras)
        frame = self.spec.tokens_per_frame
        start = min(self.sink_frames * frame, slots.size)
        stop = max(start, slots.size - self.verbatim_slots())
        known = max(0, stop - start - arrived)  # slots that were in the middle before this commit
        surplus = slots.size - self.capacity_slots()
        if stop == start:
            return slots
        part = slots.narrow(start, stop)
        middle = self._open(part, extras)
        candidates = middle.candidates()
        candidates.partner, cost = match(candidates, known, frame, self.matcher, self.weighting)
        if surplus > 0:
            part = self._shrink(layer, part, middle, candidates, cost, surplus, arrived)
        else:
            part = self._with_partner(part, candidates.partner)
        return Slots.cat(slots.narrow(0, start), part, slots.narrow(stop, slots.size))

    def _observe(self, staged: Staged, extras: dict[str, Tensor]) -> None:
        """Take the arriving queries into the running second moment."""
        if "moment" not in extras:
            return
        queries = staged.q_raw
        if self.match_space == "roped":
            queries = self.spec.rope.rotate(queries, staged.positions)
        observed = extras["observed"] + 1
        share = (1 / observed).clamp_min(1 / self.moment_horizon)
        moment = extras["moment"].float().lerp(query_moment(queries, self.moment), share)
        extras.update(moment=moment.to(extras["moment"].dtype), observed=observed)

    def _open(self, part: Slots, extras: dict[str, Tensor]) -> Middle:
        """Read the slots that may merge and map them to features."""
        key, value = (self._format.unpack(name, part.fields, torch.float32) for name in ("key", "value"))
        if self.match_space == "raw":
            key = self.spec.rope.unrotate(key, unpack_positions(part["position"]))
        moment = None
        if "moment" in extras:
            moment = expand_moment(extras["moment"], self.moment, self.spec.head_dim)
        features = key_features(key, self.similarity, query_moment=moment)
        scale = (self.value_weight * _variance(features) / _variance(value).clamp_min(1e-12)).sqrt()
        return Middle(
            key=self._fold(key),
            value=self._fold(value),
            key_features=self._fold(features),
            value_scale=self._fold(scale[..., None, None].expand(-1, -1, 1, value.shape[-1])),
            count=part["count"].float().flatten(0, 1),
            partner=part["partner"].long().flatten(0, 1),
        )

    def _shrink(
        self,
        layer: int,
        part: Slots,
        middle: Middle,
        candidates: Candidates,
        cost: Tensor,
        surplus: int,
        arrived: int,
    ) -> Slots:
        """Do `surplus` merges."""
        root, gone, partner = choose(
            candidates, cost, surplus, self.rounds, self.weighting, keep_last_key=self.key == "last"
        )
        merged, after = self._merge(part, middle, root, surplus)
        self.note_merges(layer, part, merged, root)
        keep = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : root.shape[1] - surplus]
        place = (~gone).cumsum(1) - 1
        partner = torch.where(partner < 0, -1, place.gather(1, partner.clamp_min(0))).gather(1, keep)
        renewed = min(int(self.refresh * arrived), keep.shape[1])
        if renewed:
            left = after.candidates()
            left = Candidates(
                rows_of(left.features, keep), left.count.gather(1, keep), partner, left.key_width
            )
            frame, search = self.spec.tokens_per_frame, self.matcher.exact()
            partner = renew(left, cost.gather(1, keep), renewed, frame, self.weighting, search)
        return self._with_partner(merged.gather(keep.unflatten(0, self.metadata_shape())), partner)

    def _merge(self, part: Slots, middle: Middle, root: Tensor, most: int) -> tuple[Slots, Middle]:
        """Every root's merged slot in place of its own; slots that are no root are left for the caller to drop."""
        # one sum over the groups for all that is averaged: values by their own weights, the rest by count
        weight = self._value_weights(middle, root)
        parts = [middle.value * weight[..., None], weight[..., None], middle.count[..., None]]
        if self.key == "mean":
            parts += [x * middle.count[..., None] for x in (middle.key, middle.key_features)]
        sums = segment_sum(torch.cat(parts, -1), root, most).split([x.shape[-1] for x in parts], -1)
        value, count = sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny), sums[2][..., 0]
        changed = (count > middle.count)[..., None]
        after = Middle(
            key=middle.key,
            value=torch.where(changed, value, middle.value),
            key_features=middle.key_features,
            value_scale=middle.value_scale,
            count=count,
            partner=middle.partner,
        )
        fields = self._repack(part, "value", after.value, changed)
        fields["count"] = count.clamp_max(_MAX_COUNT).to(torch.int16).unflatten(0, self.metadata_shape())
        if self.key == "mean":
            means = [x / count[..., None].clamp_min(1) for x in sums[3:]]
            after.key = torch.where(changed, means[0], middle.key)
            after.key_features = torch.where(changed, means[1], middle.key_features)
            fields.update(self._repack(part, "key", after.key, changed))
        elif self.key == "medoid":
            chosen = group_medoid(middle.key_features, root, middle.count, most)
            after.key_features = rows_of(middle.key_features, chosen)
            index = chosen.unflatten(0, self.metadata_shape())
            moved = [name for name in part.fields if name.startswith("key") or name == "position"]
            fields.update({name: take(part[name], index) for name in moved})
        return part.replace(**fields), after

    def _value_weights(self, middle: Middle, root: Tensor) -> Tensor:
        """Weights [N, M] of the members of a group in its value."""
        if self.value == "mean":
            return middle.count
        heads = 1 if self.per_head else self.spec.num_heads
        energy = middle.key_features.square().sum(-1) / heads
        return middle.count * (0.5 * (energy - energy.gather(1, root))).clamp(-8, 8).exp()

    # -- folding -------------------------------------------------------------------------------------------------

    def _fold(self, x: Tensor) -> Tensor:
        """[B, H, M, D] -> [B * H, M, D], or [B, M, H * D] if heads share their groups."""
        return x.flatten(0, 1) if self.per_head else x.transpose(1, 2).flatten(2)

    def _unfold(self, x: Tensor) -> Tensor:
        """Inverse of `_fold`."""
        if self.per_head:
            return x.unflatten(0, (self.spec.batch, self.spec.num_heads))
        return x.unflatten(2, (self.spec.num_heads, -1)).transpose(1, 2)

    def _repack(self, part: Slots, name: str, x: Tensor, changed: Tensor) -> dict[str, Tensor]:
        """Fields of `name` with x [N, M, D] packed where `changed` [N, M, 1]; the rest is not rounded again."""
        mask = changed.unflatten(0, self.metadata_shape())
        vectors = self._unfold(x)
        if name == "key" and self.match_space == "raw":
            vectors = self.spec.rope.rotate(vectors, unpack_positions(part["position"]))
        packed = self._format.pack(name, vectors)
        return {field: torch.where(mask, new, part[field]) for field, new in packed.items()}

    def _with_partner(self, part: Slots, partner: Tensor) -> Slots:
        return part.replace(partner=partner.to(part["partner"].dtype).unflatten(0, self.metadata_shape()))


def _variance(x: Tensor) -> Tensor:
    """Mean squared distance to the mean over M: [B, H, M, D] -> [B, H]."""
    return (x - x.mean(2, keepdim=True)).square().sum(-1).mean(2)
