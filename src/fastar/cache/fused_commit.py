"""A commit of `TempCache(commit_by="fused")`: several layers at a time, planned aside and then done in place.

Merged keys and values are written by `FusedEdit.apply` straight over the slots that stay, so that a plan holds indices
and counts only. What is constant once the cache is full (sizes, number of merges) is known to the host, nothing else is
asked of the device, and no tensor's address depends on its contents: both halves can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.ann.similarity import random_directions
from fastar.attention.rope import apply_rotation
from fastar.cache.base import Staged
from fastar.cache.change import Change, Edit, Joined, Scratch, close_gap
from fastar.cache.fused import FusedSlots, choose, match, moment_factors, moments, renew
from fastar.cache.fused_merge import Runs, fill, places_of_last
from fastar.cache.moments import expand_moment, pack_moment
from fastar.cache.slots import Slots, pack_positions
from fastar.interpreter import interpreted

if TYPE_CHECKING:
    from fastar.cache.tempcache import TempCache

_QUERY_SPAN = 512  # queries of one layer that a program sums: few problems must fill the device


@dataclass(frozen=True)
class Merging:
    """What is to become of the M slots of a buffer from `start` on, and of those behind them.

    Attributes:
        runs: which end where, counted from `start`; weight: tokens each stands for before that, float [N, M].
        place: int32 [N, R], where the last R of the M slots move, into those that others left; -1 for those that left.
        merge_keys: whether keys become means, as values do.
    """

    start: int
    runs: Runs
    weight: Tensor
    place: Tensor
    merge_keys: bool

    @property
    def stop(self) -> int:
        """Behind the M slots."""
        return self.start + self.weight.shape[1]

    @property
    def surplus(self) -> int:
        """R, slots that are too many."""
        return self.place.shape[1]


class FusedEdit(Edit):
    """Merges, then moves, both written where the slots are.

    Slots that merge leave holes, which those at the end of the mergeable ones fill: no more move than arrived. Slots
    behind close the gap. So the mergeable ones are no longer in order of age.

    Args:
        slots: those that there are, in `buffer`; arrivals are the last of them.
        middle: fields of the mergeable slots that stay, from slot `start` on.
        merging: None for no merges.
    """

    def __init__(
        self,
        slots: Slots,
        buffer: Slots,
        start: int,
        middle: dict[str, Tensor],
        merging: Merging | None,
    ) -> None:
        super().__init__(Change(Joined(slots, buffer.narrow(0, 0))), buffer, Scratch())
        self._start, self._middle, self._merging, self._used = start, middle, merging, slots.size
        if merging is not None:
            self.size = slots.size - merging.surplus

    def apply(self, buffer: Slots) -> None:
        merging = self._merging
        if merging is not None:
            inside = buffer.narrow(merging.start, merging.stop)
            for name in ("key", "value") if merging.merge_keys else ("value",):
                merging.runs.fold(inside[name].flatten(0, 1), merging.weight)
            for name, tensor in inside.fields.items():
                if name not in self._middle:
                    fill(tensor, merging.place)
            for tensor in buffer.fields.values():
                close_gap(tensor, merging.stop - merging.surplus, merging.surplus, self._used)
        for name, new in self._middle.items():
            buffer[name][:, :, self._start : self._start + new.shape[2]] = new


def append(policy: TempCache, buffer: Slots, staged: Sequence[Staged]) -> Slots:
    """The slots in use and, behind them, those that were staged, by layer, for which there is room in `buffer`.

    Keys and values that lie there already, as where attention read them, are not copied; the rest, which only depends
    on positions, is written for all layers at once.
    """
    size, arrived = policy.filled, staged[0].k.shape[2]
    for layer, each in enumerate(staged):
        own = {name: buffer[name].chunk(len(staged))[layer] for name in ("key", "value")}
        Slots(own).write(size, Slots({"key": each.k, "value": each.v}))
    position = pack_positions(staged[0].positions)
    metadata = policy.metadata((1, 1, arrived), position.device)
    for name, tensor in {"position": position[None, None], **metadata}.items():
        buffer[name][:, :, size : size + arrived] = tensor
    return buffer.narrow(0, size + arrived)


def plan(
    policy: TempCache,
    layers: range,
    buffer: Slots,
    staged: Sequence[Staged],
    extras: dict[str, Tensor],
) -> tuple[FusedEdit, dict[str, Tensor]]:
    """What a commit makes of several layers, whose slots are `buffer` [layers * batch, ...].

    Args:
        policy: says how.
        layers: which they are.
        staged: by layer.
        extras: of all these layers, one after the other.

    Returns:
        the edit of `buffer`, and new extras. Of `buffer`, only slots that are not in use may be written.

    Raises:
        ValueError: not on a GPU.
    """
    if buffer["key"].device.type != "cuda" and not interpreted():
        raise ValueError(
            f"commit_by=fused runs on a GPU, not on {policy.spec.device.type}: set commit_by=plain"
        )
    spec, arrived = policy.spec, staged[0].k.shape[2]
    frame, total = spec.tokens_per_frame, policy.filled + arrived
    extras = observed(policy, staged, extras)
    used = append(policy, buffer, staged)
    start, stop, known = policy.regions(total, arrived)
    if known == stop - start:  # none entered
        return FusedEdit(used, buffer, start, {}, None), extras

    inside = buffer.narrow(start, stop)
    slots = slots_of(policy, inside, extras["moment"])
    weight = slots.count
    partner, cost = match(
        slots,
        inside["partner"].to(torch.int32).flatten(0, 1),
        known,
        frame,
        policy.weighting,
        policy.match_frames,
    )
    surplus = total - policy.capacity_slots()
    merging, middle = None, {"partner": partner}
    if surplus > 0:
        first = spec.head_dim if policy.key == "last" else 0
        root, gone, partner, runs, rows = choose(
            slots,
            partner,
            cost,
            surplus,
            policy.rounds,
            policy.weighting,
            first=first,
            again=policy.refresh > 0,
        )
        partner = renewed(policy, slots, inside["position"], gone, partner, cost, surplus, arrived)
        place = places_of_last(gone, rows)
        middle = kept(slots, partner, place)
        merging = Merging(start, runs, weight, place, policy.key == "mean")
        note(policy, layers, inside, root)
    for name, new in middle.items():
        tensor = buffer[name]
        middle[name] = new.to(tensor.dtype).unflatten(0, tensor.shape[:2])
    return FusedEdit(used, buffer, start, middle, merging), extras


def slots_of(policy: TempCache, inside: Slots, moment: Tensor) -> FusedSlots:
    """Features of the slots `inside`, by the stored second moments of their layers."""
    width, device = policy.spec.head_dim, moment.device
    projection = None
    if policy.match_width is not None and policy.match_width < 2 * width:
        projection = random_directions(0, 2 * width, policy.match_width, device)
    factor = moment_factors(expand_moment(moment, "full", width).flatten(0, 1))
    count = inside["count"].float().flatten(0, 1)
    return FusedSlots.of(
        inside["key"], inside["value"], count, factor, policy.value_weight, projection, policy.cost_by
    )


def renewed(
    policy: TempCache,
    slots: FusedSlots,
    position: Tensor,
    gone: Tensor,
    partner: Tensor,
    cost: Tensor,
    surplus: int,
    arrived: int,
) -> Tensor:
    """partner [N, M], searched anew for some of the slots that are not gone; `cost` is from before the merges."""
    stay = gone.shape[1] - surplus
    number = min(int(policy.refresh * arrived), stay)
    if not number:
        return partner
    age = torch.where(gone != 0, torch.iinfo(torch.int32).max, position.flatten(0, 1))
    wide = age.argsort(dim=1, stable=True)[:, :stay]  # by age
    own, before, frame = partner.gather(1, wide), cost.gather(1, wide), policy.spec.tokens_per_frame
    found = renew(slots, wide.to(torch.int32), own, before, number, frame, policy.weighting)
    return partner.scatter(1, wide, found)


def kept(slots: FusedSlots, partner: Tensor, place: Tensor) -> dict[str, Tensor]:
    """Counts and partners [N, K] of the slots that stay, where they are to be: the last ones at `place`."""
    stay = partner.shape[1] - place.shape[1]
    moved = place.gather(1, (partner - stay).clamp_min(0).long())
    partner = torch.where(partner < stay, partner, moved)
    most = torch.iinfo(torch.int16).max
    fields = {"count": slots.count.clamp_max(most), "partner": partner}
    return {name: fill(x[None], place)[0, :, :stay] for name, x in fields.items()}


def observed(policy: TempCache, staged: Sequence[Staged], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """`extras` with the arriving queries taken into the second moments of all layers."""
    spec = policy.spec
    tables, arrived = spec.rope.tables(staged[0].positions), staged[0].k.shape[2]
    queries = [apply_rotation(each.q_raw, tables) if each.q is None else each.q for each in staged]
    second = moments(*queries, span=_QUERY_SPAN)[1]
    moment = pack_moment(second.unflatten(0, (-1, spec.num_heads)) / arrived)
    seen = extras["observed"] + 1
    share = (1 / seen).clamp_min(1 / policy.moment_horizon)[:, None].expand(-1, spec.batch).reshape(-1, 1, 1)
    old = extras["moment"]
    return {"moment": old.float().lerp(moment, share).to(old.dtype), "observed": seen}


def note(policy: TempCache, layers: range, inside: Slots, root: Tensor) -> None:
    """Tell who follows the merges, layer by layer."""
    if not policy.is_followed():
        return
    positions, roots = inside["position"].chunk(len(layers)), root.long().chunk(len(layers))
    for layer, position, own in zip(layers, positions, roots, strict=True):
        slots = Slots({"position": position})
        policy.note_merges(layer, slots, slots, own)
