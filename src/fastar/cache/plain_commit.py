"""A commit of `TempCache(commit_by="plain")`: one layer at a time, in PyTorch, whatever the matcher and the settings.

It defines what `fastar.cache.fused_commit` does for several layers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.cache.allocation import Candidates, choose, match, renew
from fastar.cache.base import Staged
from fastar.cache.change import Change, Joined
from fastar.cache.merge import flat_index, joins_of, rows_of, segment_sum
from fastar.cache.middle import Middle
from fastar.cache.moments import query_moment
from fastar.cache.slots import Slots

if TYPE_CHECKING:
    from fastar.cache.tempcache import TempCache

MAX_COUNT = torch.iinfo(torch.int16).max  # tokens that a slot can say it stands for


def merge_arrivals(
    policy: TempCache, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
) -> Change:
    """What a commit makes of one layer: as `SlotPolicy.absorb`."""
    _observe(policy, staged, extras)
    frame = policy.spec.tokens_per_frame
    start, stop, known = policy.regions(slots.size, arrived)
    surplus = slots.size - policy.capacity_slots()
    if known == stop - start:  # none entered
        return Change(slots)
    middle = Middle(slots.narrow(start, stop), policy.rules(), extras.get("moment"))
    candidates = middle.candidates
    candidates.partner, cost = match(candidates, known, frame, policy.matcher, policy.weighting)
    change = Change(slots, first=start, arrivals_stay=stop <= slots.size - arrived)
    if surplus > 0:
        _shrink(policy, layer, change, middle, cost, surplus, arrived)
        newer = torch.arange(stop, slots.size, device=cost.device).expand(*policy.metadata_shape(), -1)
        assert change.keep is not None and change.place is not None
        change.keep, change.place = torch.cat([change.keep + start, newer], 2), change.place + start
    else:
        change.whole["partner"] = policy.as_metadata("partner", candidates.partner)
    for name, inner in change.whole.items():
        sink, recent = slots.narrow(0, start)[name], slots.narrow(stop, slots.size)[name]
        change.whole[name] = torch.cat([sink, inner, recent], 2)
    return change


def _observe(policy: TempCache, staged: Staged, extras: dict[str, Tensor]) -> None:
    """Take the arriving queries into the running second moment."""
    if "moment" not in extras:
        return
    queries = staged.q_raw
    if policy.match_space == "roped":
        queries = policy.spec.rope.rotate(queries, staged.positions)
    observed = extras["observed"] + 1
    share = (1 / observed).clamp_min(1 / policy.moment_horizon)
    moment = extras["moment"].float().lerp(query_moment(queries, policy.moment), share)
    extras.update(moment=moment.to(extras["moment"].dtype), observed=observed)


def _shrink(
    policy: TempCache,
    layer: int,
    change: Change,
    middle: Middle,
    cost: Tensor,
    surplus: int,
    arrived: int,
) -> None:
    """Plan `surplus` merges: what of the middle is kept and written is noted in `change`, by its own indices."""
    candidates, shape = middle.candidates, policy.metadata_shape()
    root, gone, partner = choose(
        candidates, cost, surplus, policy.rounds, policy.weighting, keep_last_key=policy.key == "last"
    )
    joins = joins_of(root, surplus)
    change.rows, features = middle.merged(root, joins)
    change.place = joins.place.unflatten(0, shape)
    position = middle.slots["position"]
    if "position" in change.rows:
        position = position.scatter(2, change.place, change.rows["position"])
    policy.note_merges(layer, middle.slots, Slots({"position": position}), root)

    keep = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : root.shape[1] - surplus]
    change.keep = keep.unflatten(0, shape)
    count = segment_sum(candidates.count[..., None], root, surplus)[..., 0].gather(1, keep)
    rank = (~gone).cumsum(1) - 1
    partner = torch.where(partner < 0, -1, rank.gather(1, partner.clamp_min(0))).gather(1, keep)
    renewed = min(int(policy.refresh * arrived), keep.shape[1])
    if renewed:
        index = flat_index(joins.place, root.shape[1])
        candidates.features.flatten(0, 1).index_copy_(0, index, features.flatten(0, 1))
        left = Candidates(
            rows_of(candidates.features, keep),
            count,
            partner,
            candidates.key_width,
            candidates.projection,
            candidates.cost_by,
        )
        frame, search = policy.spec.tokens_per_frame, policy.matcher.exact()
        partner = renew(left, cost.gather(1, keep), renewed, frame, policy.weighting, search)
    change.whole["count"] = policy.as_metadata("count", count.clamp_max(MAX_COUNT))
    change.whole["partner"] = policy.as_metadata("partner", partner)
