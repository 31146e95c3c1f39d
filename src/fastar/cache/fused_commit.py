"""A commit of `TempCache(commit="fused")`: several layers at a time, planned aside and then done in place.

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
from fastar.cache.base import Staged
from fastar.cache.change import Change, Edit, Joined, Scratch
from fastar.cache.fused import (
    FusedSlots,
    Runs,
    choose,
    compact,
    match,
    moment_factors,
    moments,
    places,
    renew,
)
from fastar.cache.moments import expand_moment, pack_moment
from fastar.cache.slots import Slots, pack_positions
from fastar.interpreter import interpreted

if TYPE_CHECKING:
    from fastar.cache.tempcache import TempCache

_QUERY_SPAN = 512  # queries of one layer that a program sums: few problems must fill the device


@dataclass(frozen=True)
class Merging:
    """What is to become of slots start .. stop - 1 of a buffer, and of those behind them.

    Attributes:
        runs: which end where, counted from `start`; count: tokens each stands for, float [N, M].
        keep: int32 [N, K] ascending, the slots from `start` on that stay.
        merge_keys: whether keys become means, as values do.
    """

    start: int
    stop: int
    runs: Runs
    count: Tensor
    keep: Tensor
    merge_keys: bool


class FusedEdit(Edit):
    """Merges, then moves, both written where the slots are.

    Args:
        slots: those that there are, in `buffer`; arrivals are the last of them.
        whole: fields of all slots that stay, without those left out.
        merging: None for no merges.
    """

    def __init__(
        self, slots: Slots, buffer: Slots, whole: dict[str, Tensor], merging: Merging | None
    ) -> None:
        super().__init__(Change(Joined(slots, buffer.narrow(0, 0)), whole=whole), buffer, Scratch())
        self._merging = merging
        if merging is not None:
            self.size = merging.start + merging.keep.shape[1]

    def apply(self, buffer: Slots) -> None:
        merging, whole = self._merging, self._change.whole
        if merging is not None:
            for name in ("key", "value") if merging.merge_keys else ("value",):
                inside = buffer[name][:, :, merging.start : merging.stop].flatten(0, 1)
                merging.runs.fold(inside, merging.count)
            for name, tensor in buffer.fields.items():
                if name not in whole:
                    compact(tensor, merging.keep, merging.start)
        for name, new in whole.items():
            buffer[name][:, :, : self.size] = new


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
    start = min(policy.sink_frames * frame, total)
    stop = max(start, total - policy.verbatim_slots())
    if stop == start:
        return FusedEdit(used, buffer, {}, None), extras

    inside = buffer.narrow(start, stop)
    slots = slots_of(policy, inside, extras["moment"])
    count = slots.count
    partner, cost = match(
        slots,
        inside["partner"].to(torch.int32).flatten(0, 1),
        max(0, stop - start - arrived),
        frame,
        policy.weighting,
    )
    surplus = total - policy.capacity_slots()
    merging, whole = None, {"partner": partner}
    if surplus > 0:
        first = spec.head_dim if policy.key == "last" else 0
        root, gone, partner, runs = choose(
            slots,
            partner,
            cost,
            surplus,
            policy.rounds,
            policy.weighting,
            first=first,
            again=policy.refresh > 0,
        )
        keep, whole = kept(policy, slots, gone, partner, cost, surplus, arrived)
        newer = torch.arange(stop, total, dtype=torch.int32, device=keep.device).expand(len(keep), -1)
        keep = torch.cat([keep + start, newer], 1)
        merging = Merging(start, stop, runs, count, keep, policy.key == "mean")
        note(policy, layers, inside, root)
    for name, new in whole.items():
        tensor = buffer[name]
        new = new.to(tensor.dtype).unflatten(0, tensor.shape[:2])
        whole[name] = torch.cat([tensor[:, :, :start], new, tensor[:, :, stop:total]], 2)
    return FusedEdit(used, buffer, whole, merging), extras


def slots_of(policy: TempCache, inside: Slots, moment: Tensor) -> FusedSlots:
    """Features of the slots `inside`, by the stored second moments of their layers."""
    width, device = policy.spec.head_dim, moment.device
    projection = None
    if policy.match_width is not None:
        projection = random_directions(0, 2 * width, policy.match_width, device)
    factor = moment_factors(expand_moment(moment, "full", width).flatten(0, 1))
    count = inside["count"].float().flatten(0, 1)
    return FusedSlots.of(inside["key"], inside["value"], count, factor, policy.value_weight, projection)


def kept(
    policy: TempCache,
    slots: FusedSlots,
    gone: Tensor,
    partner: Tensor,
    cost: Tensor,
    surplus: int,
    arrived: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The slots that stay, int32 [N, K] ascending, and their counts and partners, these by the new numbers."""
    size = gone.shape[1]
    keep = places(gone, size - surplus, wanted=False)
    wide = keep.long()
    partner = partner.gather(1, wide)
    renewed = min(int(policy.refresh * arrived), size - surplus)
    if renewed:
        before = cost.gather(1, wide)
        frame = policy.spec.tokens_per_frame
        partner = renew(slots, keep, partner, before, renewed, frame, policy.weighting)
    rank = (gone == 0).cumsum(1, dtype=torch.int32) - 1
    partner = torch.where(partner < 0, -1, rank.gather(1, partner.clamp_min(0).long()))
    return keep, {
        "count": slots.count.gather(1, wide).clamp_max(torch.iinfo(torch.int16).max),
        "partner": partner,
    }


def observed(policy: TempCache, staged: Sequence[Staged], extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """`extras` with the arriving queries taken into the second moments of all layers."""
    spec = policy.spec
    cosine, sine = (x.float() for x in spec.rope.tables(staged[0].positions))
    queries = [each.q_raw for each in staged]
    _, second = moments(*queries, turns=(cosine, sine), span=_QUERY_SPAN)
    moment = pack_moment(second.unflatten(0, (-1, spec.num_heads)) / staged[0].k.shape[2])
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
