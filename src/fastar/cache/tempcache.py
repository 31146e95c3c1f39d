"""TempCache under a hard budget: when the cache is full, the cheapest pairs of slots merge, old with old included.

The paper (section 1, "TempCache") merges keys that correspond across frames into one slot with the newest key, the mean
value and a logit bias log m; attention is unchanged if the merged keys are equal (lemma). Here the number of slots is
fixed instead of a threshold: of all slots, the merges that cost least are done, exactly as many as tokens arrive.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from fastar.ann.base import Matcher
from fastar.ann.exact import ExactMatcher
from fastar.ann.launch import check_triton
from fastar.ann.similarity import SIMILARITIES, Similarity
from fastar.cache.allocation import CostBy
from fastar.cache.base import Staged, check_choice
from fastar.cache.budget import BudgetedPolicy, BudgetOptions
from fastar.cache.change import Change, Joined, Prepared, Scratch
from fastar.cache.fused_commit import plan
from fastar.cache.merge import Representative, Weighting
from fastar.cache.middle import MatchSpace, MergedValue, MergeRules
from fastar.cache.moments import Moment, moment_shape
from fastar.cache.plain_commit import MAX_COUNT, merge_arrivals
from fastar.cache.slots import Slots


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
            key would draw from Gaussian queries, exp(E[(q . k)^2] / 2d); or the newest member's (`last`: no averaging).
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
        matcher: how an arrival's partners are found; exact by default. Partners are searched anew among all newer slots
            by what goes with it (`Matcher.exact`).
        commit_by: `plain`: layer by layer, in PyTorch and with `matcher`: the definition. `fused`: the same steps for
            many layers at once by Triton kernels (`fastar.cache.fused`), with features in the dtype of the slots and
            an exact search of their own; for the default similarity, slots of 16 bits and groups that each head makes
            for itself. Commits of several chunks (a prefill) are plain.
        match_width: numbers that a search for partners compares, a power of two, at least 16: the features along so
            many random directions. None, or as many as there are: all.
        match_frames: newest frames of those that enter in which a search looks for partners. None: all.
        cost_by: what costs are of: all `features`, or those `searched` by, along the directions of `match_width`.
        layers_at_once: with `fused`, most layers whose plans are made together; more need more memory for the moment,
            4 D bytes a slot and head each.
        budget: see `BudgetedPolicy`.
    """

    def __init__(
        self,
        *,
        similarity: Similarity = "expected_logit_change",
        match_space: MatchSpace = "roped",
        key: Representative = "mean",
        value: MergedValue = "mean",
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
        commit_by: Literal["plain", "fused"] = "plain",
        match_width: int | None = None,
        match_frames: int | None = None,
        cost_by: CostBy = "features",
        layers_at_once: int = 30,
        **budget: Unpack[BudgetOptions],
    ) -> None:
        super().__init__(**budget)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("match_space", match_space, ("raw", "roped"))
        check_choice("key", key, ("last", "mean", "medoid"))
        check_choice("value", value, ("mean", "value_aware", "last"))
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
        self.commit_by, self.match_width, self.layers_at_once = commit_by, match_width, layers_at_once
        self.match_frames, self.cost_by = match_frames, cost_by
        self._check_commit_by()

    def _check_commit_by(self) -> None:
        check_choice("commit_by", self.commit_by, ("plain", "fused"))
        width = self.match_width
        if width is not None and (width < 16 or width & (width - 1)):
            raise ValueError(f"match_width must be a power of two and at least 16, got {width}")
        if self.layers_at_once < 1 or (self.match_frames is not None and self.match_frames < 1):
            raise ValueError(
                f"layers_at_once and match_frames must be at least 1, got {self.layers_at_once} and {self.match_frames}"
            )
        check_choice("cost_by", self.cost_by, ("features", "searched"))
        if self.commit_by == "plain":
            return
        check_triton()
        wanted = {
            "similarity": "expected_logit_change", "match_space": "roped", "value": "mean", "per_head": True,
            "moment": "full",
        }  # fmt: skip
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"commit_by=fused needs {name}={value}, got {getattr(self, name)}")
        if self.cost_by == "searched" and self.key != "mean":
            raise ValueError(f"commit_by=fused with cost_by=searched needs key=mean, got {self.key}")
        if self.key == "medoid" or self._format.bits != 16:
            raise ValueError(
                f"commit_by=fused needs key=mean or last and slot_bits=16, got {self.key} and {self._format.bits}"
            )

    # -- what a slot and a layer keep ----------------------------------------------------------------------------

    def metadata_shape(self) -> tuple[int, int]:
        return (self.spec.batch, self.spec.num_heads if self.per_head else 1)

    def metadata(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        # An index needs 4 bytes where a budget holds more slots than int16 can number; both are tried against the
        # budget in tokens of keys and values alone, which bounds the number of slots from above.
        payload = 2 * self.spec.num_layers * self.spec.batch * self.spec.num_heads * self.spec.head_dim
        wide = self.total_budget() * 8 // (payload * self._format.bits) > MAX_COUNT // 2
        return {
            "count": torch.ones(shape, dtype=torch.int16, device=device),
            "partner": torch.full(shape, -1, dtype=torch.int32 if wide else torch.int16, device=device),
        }

    def as_metadata(self, name: str, x: Tensor) -> Tensor:
        """x [N, M] as the field `name` is stored."""
        return x.to(self._buffers[0][name].dtype).unflatten(0, self.metadata_shape())

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

    def spare_slots(self) -> int:
        return self.spec.chunk_frames * self.spec.tokens_per_frame if self.commit_by == "fused" else 0

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

    @property
    def _has_merged(self) -> bool:
        """Whether the cache has been full, so that frames before `exact_from` share slots."""
        return self.exact_from > self.first_frame

    def regions(self, total: int, arrived: int) -> tuple[int, int, int]:
        """Of `total` slots, the last `arrived` of them new: where those that may merge start and stop.

        Third, how many of these had entered before, and so have partners: after a rewrite, nothing may enter anew.
        """
        capacity, size = self.capacity_slots(), total
        if self._has_merged:
            size, arrived = max(total, capacity), min(arrived, max(0, total - capacity))
        start = min(self.sink_frames * self.spec.tokens_per_frame, total)
        stop = max(start, size - self.verbatim_slots())
        return start, stop, max(0, stop - start - arrived)

    def layout(self) -> tuple[int, ...] | None:
        return (self.filled, self._buffers.generation, self._has_merged)

    def old_slots(self, layer: int) -> Slots:
        slots = super().old_slots(layer)
        return self._by_age(slots) if self.commit_by == "fused" and self._has_merged else slots

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        if (
            self.commit_by == "plain" and self._has_merged and self.key != "medoid"
        ):  # a medoid's place is no age
            for buffer in self._buffers:  # it may have been saved by fused commits
                buffer.write(0, self._by_age(buffer.narrow(0, self.filled)))

    def _by_age(self, slots: Slots) -> Slots:
        """A copy, oldest first, which fused commits do not keep."""
        order = slots["position"].argsort(dim=2, stable=True)
        rank = order.argsort(dim=2)
        start = self.regions(self.filled, 0)[0]
        partner = slots["partner"].gather(2, order)
        moved = rank.gather(2, partner.clamp_min(0).long() + start) - start
        partner = torch.where(partner < 0, -1, moved).to(partner.dtype)
        return slots.gather(order).replace(partner=partner)

    # -- a commit of many layers at once ---------------------------------------------------------------------------

    def _commit_layers(self, scratch: Scratch) -> Prepared:
        spec, staged = self.spec, self._staged
        if self.commit_by == "plain" or staged[0].k.shape[2] > spec.chunk_frames * spec.tokens_per_frame:
            return super()._commit_layers(scratch)
        together = max(n for n in range(1, self.layers_at_once + 1) if spec.num_layers % n == 0)
        prepared: Prepared = []
        for first in range(0, spec.num_layers, together):
            layers = range(first, first + together)
            extras = {
                name: torch.cat([self._extras[layer][name] for layer in layers]) for name in self._extras[0]
            }
            own = [staged[layer] for layer in layers]
            with torch.cuda.device_of(own[0].k):  # Triton launches on the current device
                prepared.append(plan(self, layers, self._buffers.part(layers), own, extras))
        return prepared

    # -- a commit ------------------------------------------------------------------------------------------------

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Change:
        return merge_arrivals(self, layer, slots, arrived, staged, extras)

    def rules(self) -> MergeRules:
        """How slots merge."""
        return MergeRules(
            spec=self.spec,
            format=self._format,
            similarity=self.similarity,
            match_space=self.match_space,
            key=self.key,
            value=self.value,
            value_weight=self.value_weight,
            per_head=self.per_head,
            moment=self.moment,
            match_width=self.match_width,
            match_frames=self.match_frames,
            cost_by=self.cost_by,
        )
