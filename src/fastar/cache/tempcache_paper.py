"""TempCache by the letter of the paper (arXiv 2602.01801, section 1 of our notes): a threshold, and no budget."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from fastar.ann.base import Matcher
from fastar.ann.exact import ExactMatcher
from fastar.ann.similarity import SIMILARITIES, Similarity, key_features
from fastar.cache.base import CacheSpec, Staged, check_choice
from fastar.cache.change import Joined, Prepared
from fastar.cache.merge import Representative, find_roots, group_mean, group_medoid, rows_of
from fastar.cache.middle import MatchSpace
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import SlotOptions, Slots, take, unpack_positions
from fastar.cache.threshold_errors import ErrorKind, ErrorRule, ThresholdErrors

log = logging.getLogger(__name__)


class TempCachePaper(SlotPolicy):
    """Merges a token into what it corresponds to in earlier frames if the two keys are similar enough.

    Frame by frame and head by head: the query of each arriving token is matched to the previous key it attends to
    most (top-1 search); if that key and its own are at least `threshold` similar, the two are one group, with the most
    recent key, the mean value and log m. Several tokens that correspond to one key form one group. Memory has no bound:
    without redundancy this is dense attention. Heads end with different numbers of slots; the shorter ones are padded
    with empty slots (log-count -inf), which costs memory and is counted.

    The paper leaves open what we chose: keys are compared before RoPE, by cosine, from the first frame on, per head,
    all previous frames searched, in the commit pass at t = 0.

    Args:
        threshold: least similarity of a merge; the paper's figure 10a sweeps 0.9 to 0.5.
        error_target: instead of a threshold: the largest relative error of attention's output that merges may cause on
            the clips of the measurement; every layer gets a threshold of its own.
        threshold_errors: that measurement, or its file; None uses `threshold` in all layers, with a warning.
        error_rule, error_kind: what keeps to the target, see `ThresholdErrors.choose`.
        similarity: of the two keys; cosine, centred (cosine about the mean previous key) or dot (a logit).
        match_by: find the correspondent with the token's `query` (the paper) or with its `key`.
        match_space: compare before RoPE (raw) or after it (roped).
        key: which key a group keeps: the most recent (the paper), the mean at the newest position, or the medoid
            of those that meet (the paper ablates both: 90 % / 75 % / 66 % recall).
        value: the mean over the group (the paper, which does not ablate it), or the most recent one (last).
        log_count: add log m to the logits of merged slots.
        one_to_one: of several tokens that correspond to one key only the most similar merges; the others stay apart.
        sink_frames: first frames that never take part in a merge.
        matcher: how correspondents are found; exact by default.
        slots: slot_bits, storage, quant_group, read_slots: see `SlotCache`.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        error_target: float | None = None,
        threshold_errors: ThresholdErrors | str | Path | None = None,
        error_rule: ErrorRule = "layer",
        error_kind: ErrorKind = "measured",
        similarity: Similarity = "cosine",
        match_by: Literal["query", "key"] = "query",
        match_space: MatchSpace = "raw",
        key: Representative = "last",
        value: Literal["mean", "last"] = "mean",
        log_count: bool = True,
        one_to_one: bool = False,
        sink_frames: int = 0,
        matcher: Matcher | None = None,
        **slots: Unpack[SlotOptions],
    ) -> None:
        super().__init__(**slots)
        check_choice("similarity", similarity, tuple(s for s in SIMILARITIES if s != "expected_logit_change"))
        check_choice("match_by", match_by, ("query", "key"))
        check_choice("match_space", match_space, ("raw", "roped"))
        check_choice("key", key, ("last", "mean", "medoid"))
        check_choice("value", value, ("mean", "last"))
        if sink_frames < 0:
            raise ValueError(f"sink_frames must not be negative, got {sink_frames}")
        if error_target is not None and error_target < 0:
            raise ValueError(f"error_target must not be negative, got {error_target}")
        self.error_target, self.threshold_errors = error_target, threshold_errors
        self.error_rule, self.error_kind = error_rule, error_kind
        self.thresholds: list[float] = []  # of the layers, once bound
        self.threshold, self.similarity, self.match_by, self.match_space = (
            threshold,
            similarity,
            match_by,
            match_space,
        )
        self.key, self.value, self.log_count = key, value, log_count
        self.one_to_one, self.sink_frames = one_to_one, sink_frames
        self.matcher = ExactMatcher() if matcher is None else matcher

    def settings(self) -> dict[str, Any]:
        """What decides, beside the threshold, what merges and what that costs."""
        named = (
            "similarity",
            "match_by",
            "match_space",
            "key",
            "value",
            "log_count",
            "one_to_one",
            "sink_frames",
        )
        own = {name: getattr(self, name) for name in named}
        return own | {"matcher": type(self.matcher).__name__, "slot_bits": self._format.bits}

    def bind(self, spec: CacheSpec) -> None:
        self.thresholds = self._choose_thresholds(spec.num_layers)
        super().bind(spec)

    def _choose_thresholds(self, layers: int) -> list[float]:
        known = self.threshold_errors
        if self.error_target is None or known is None:
            if self.error_target is not None:
                log.warning("threshold_errors=null: all layers merge from %s on", self.threshold)
            return [self.threshold] * layers
        errors = ThresholdErrors.load(known) if isinstance(known, str | Path) else known
        if errors.num_layers != layers:
            raise ValueError(
                f"threshold_errors speak of {errors.num_layers} layers, but the backbone has {layers}: measure them on "
                "this backbone (experiments/calibrate_thresholds.py)"
            )
        for name, value in self.settings().items():
            if errors.settings.get(name) != value:
                raise ValueError(
                    f"threshold_errors were measured with {name}={errors.settings.get(name)}, but this cache has "
                    f"{value}: measure them with the same settings (experiments/calibrate_thresholds.py)"
                )
        return errors.choose(self.error_target, rule=self.error_rule, kind=self.error_kind)

    def metadata_shape(self) -> tuple[int, int]:
        return (self.spec.batch, self.spec.num_heads)

    def metadata(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        return {"count": torch.ones(shape, dtype=torch.int32, device=device)}  # 0 marks an empty slot

    def slots_used(self) -> int:
        used = [int((buffer["count"][:, :, : self.filled] > 0).sum()) for buffer in self._buffers]
        lists = self.spec.num_layers * self.spec.batch * self.spec.num_heads
        return -(-sum(used) // lists)

    def drop_from(self, first_frame: int) -> None:
        if first_frame < self.next_frame:
            raise ValueError(
                f"frames from {first_frame} on cannot be rewritten: tempcache_paper merges every frame as it arrives "
                "and keeps none apart; use cache=tempcache with recent_frames, or a dense or window cache"
            )

    def layout(self) -> None:
        """None: how many slots a commit fills depends on what arrives, and the host has to know."""
        return None

    def _log_count(self, slots: Slots) -> Tensor:
        count = slots["count"].float()
        return (count if self.log_count else count.clamp_max(1)).log()

    def _take_in(self, prepared: Prepared) -> int:
        # One wait for the device a commit: layers are cut to the longest list of slots in any of them.
        layers = [(slots, extras) for slots, extras in prepared if isinstance(slots, Slots)]
        size = int(torch.stack([(slots["count"] > 0).sum(-1).max() for slots, _ in layers]).max())
        padded: Prepared = []
        for slots, extras in layers:
            kept = slots.narrow(0, min(size, slots.size))
            padded.append(
                (Slots.cat(kept, slots.empty(size - kept.size)) if kept.size < size else kept, extras)
            )
        self._store(padded)
        return size

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Slots:
        frame, past = self.spec.tokens_per_frame, slots.size - arrived
        kept = slots.narrow(0, past)
        keys = self._keys(kept)
        for first in range(0, arrived, frame):
            part = slice(first, first + frame)
            new = slots.narrow(past + first, past + first + frame)
            probe = staged.q_raw if self.match_by == "query" else staged.k_raw
            own, probe = staged.k_raw[:, :, part], probe[:, :, part]
            if self.match_space == "roped":
                own, probe = (self.spec.rope.rotate(x, staged.positions[part]) for x in (own, probe))
            if kept.size:
                kept, keys = self._merge_frame(layer, kept, keys, new, own, probe)
            else:
                kept, keys = new, self._keys(new)
        return kept

    def _keys(self, slots: Slots) -> Tensor:
        """Stored keys [N, S, D] in match space, float32."""
        keys = self._format.unpack("key", slots.fields, torch.float32)
        if self.match_space == "raw":
            keys = self.spec.rope.unrotate(keys, unpack_positions(slots["position"]))
        return keys.flatten(0, 1)

    def _merge_frame(
        self, layer: int, kept: Slots, past: Tensor, new: Slots, own: Tensor, probe: Tensor
    ) -> tuple[Slots, Tensor]:
        """Slots, live ones first, and their keys after a frame of tokens came.

        Keys `past` [N, S, D] of the slots, `own` and probes `probe` [B, H, T, D] of the tokens are in match space.
        """
        shape = self.metadata_shape()
        own, probe = (x.float().flatten(0, 1) for x in (own, probe))
        count = torch.cat([kept["count"], new["count"]], 2).flatten(0, 1)
        size, tokens = past.shape[1], own.shape[1]

        live = count[:, :size] > 0
        live[:, : self.sink_frames * self.spec.tokens_per_frame] = (
            False  # sinks stay first: nothing merges into them
        )
        found, _ = self.matcher.nearest(probe, past, valid=live)
        merges = (found >= 0) & (self._similarity(own, past, live, found) >= self.thresholds[layer])
        if self.one_to_one:
            merges &= self._best_of_each(own, past, live, found, merges)
        root = self._roots(found, merges, size)
        gone = root != torch.arange(size + tokens, device=root.device)

        both = Slots.cat(kept, new)
        weight = count.float()
        value = self._format.unpack("value", both.fields, torch.float32).flatten(0, 1)
        merged_value, mass = group_mean(value, root, weight, 2 * tokens)
        changed = mass > weight
        fields = self._packed_where(changed, "value", merged_value, both) if self.value == "mean" else {}
        fields["count"] = mass.round().to(torch.int32).unflatten(0, shape)
        keys = torch.cat([past, own], 1)
        if self.key == "mean":
            mean = group_mean(keys, root, weight, 2 * tokens)[0].unflatten(0, shape)
            if self.match_space == "raw":
                mean = self.spec.rope.rotate(mean, unpack_positions(both["position"]))
            fields.update(self._packed_where(changed, "key", mean.flatten(0, 1), both))
        elif self.key == "medoid":
            index = group_medoid(keys, root, weight, 2 * tokens).unflatten(0, shape)
            moved = [name for name in both.fields if name.startswith("key") or name == "position"]
            fields.update({name: take(both[name], index) for name in moved})
        merged = both.replace(**fields)
        self.note_merges(layer, both, merged, root)
        empty = gone | (count == 0)
        merged = merged.replace(count=merged["count"].masked_fill(empty.unflatten(0, shape), 0))
        order = empty.to(torch.int8).argsort(dim=1, stable=True)
        merged = merged.gather(order.unflatten(0, shape))
        if self.key != "last":
            return merged, self._keys(merged)
        return merged, rows_of(torch.cat([past, self._keys(new)], 1), order)  # no stored key has changed

    def _similarity(self, own: Tensor, past: Tensor, live: Tensor, found: Tensor) -> Tensor:
        """Similarity [N, T] of each token's key to the past key it was matched with."""
        mean = None
        if self.similarity == "centred":
            weight = live[..., None].float()
            mean = (past * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
        pairs = (own, rows_of(past, found.clamp_min(0)))
        maps = [key_features(x, self.similarity, mean=mean) for x in pairs]
        return (maps[0] * maps[1]).sum(-1)

    def _best_of_each(self, own: Tensor, past: Tensor, live: Tensor, found: Tensor, merges: Tensor) -> Tensor:
        """Whether each token is the most similar (the newest of equals) of those that found the same past key."""
        score = self._similarity(own, past, live, found).masked_fill(~merges, -torch.inf)
        same = found[:, :, None] == found[:, None, :]
        tokens = torch.arange(found.shape[1], device=found.device)
        later = tokens > tokens[:, None]
        rival = score[:, None, :]
        beaten = same & ((rival > score[..., None]) | ((rival == score[..., None]) & later))
        return ~beaten.any(-1)

    @staticmethod
    def _roots(found: Tensor, merges: Tensor, size: int) -> Tensor:
        """Groups as roots [N, size + T]: a past slot and the tokens that merge with it end at the last of these."""
        problems, tokens = found.shape
        own = torch.arange(size + tokens, device=found.device).expand(problems, -1)
        token = own[:, size:]
        target = torch.where(
            merges, found, size
        )  # tokens that merge nowhere write to a column that is cut off
        newest = torch.cat([own[:, :size], own[:, :1]], 1).scatter_reduce(1, target, token, "amax")[:, :size]
        group = newest.gather(1, found.clamp_min(0)) if size else token
        return find_roots(torch.cat([newest, torch.where(merges, group, token)], 1))

    def _packed_where(self, changed: Tensor, name: str, x: Tensor, old: Slots) -> dict[str, Tensor]:
        """Fields of `name` with x [N, M, D] packed where `changed` [N, M], as they were elsewhere."""
        shape = self.metadata_shape()
        packed = self._format.pack(name, x.unflatten(0, shape))
        mask = changed.unflatten(0, shape)[..., None]
        return {field: torch.where(mask, new, old[field]) for field, new in packed.items()}
