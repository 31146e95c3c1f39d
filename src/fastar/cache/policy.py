"""Policies that keep tokens in slots: staging, atomic commits and rewriting, once for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from fastar.cache.base import Execute, Staged, at_once
from fastar.cache.change import Change, Edit, Joined, Prepared, Scratch
from fastar.cache.lineage import Lineage, PartOfHeads
from fastar.cache.slot_cache import SlotCache
from fastar.cache.slots import SlotOptions, Slots
from fastar.cache.staging import blocks_of, check_commit, check_staged


class SlotPolicy(SlotCache):
    """A policy is what `absorb` does with one layer's old slots and the tokens that arrive.

    A commit first works out what is to be done to the slots of all layers (`prepare`, which may fail and changes
    nothing), then does it in place (`finish`, which allocates nothing). Slots are ordered by age, oldest first, unless
    a policy says otherwise of those that merge.

    Args:
        slots: slot_bits, storage, quant_group, read_slots: see `SlotCache`.
    """

    def __init__(self, **slots: Unpack[SlotOptions]) -> None:
        super().__init__(**slots)
        self._staged: dict[int, Staged] = {}
        self.first_frame = 0  # the rollout's first frame, an absolute index
        self.next_frame = 0  # frames before this one have been committed
        self.exact_from = 0  # frames from this one on are kept verbatim, as the newest slots
        self._lineage: Lineage | PartOfHeads | None = None

    # -- what a policy says about itself -------------------------------------------------------------------------

    @abstractmethod
    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Slots | Change:
        """What to keep of `slots`, whose last `arrived` are new, as new slots or as a change of these.

        Must not write to `slots`. May replace entries of `extras`, a fresh dict.
        """

    def verbatim_slots(self) -> int:
        """How many of the newest slots stay as they came once the cache is full."""
        return 0

    def old_slots(self, layer: int) -> Slots:
        """A layer's slots before a commit, as `absorb` is to see them."""
        return self._buffers[layer].narrow(0, self.filled)

    def note_merges(self, layer: int, before: Slots, after: Slots, root: Tensor) -> None:
        """To be called by policies that merge: `before` ended in slots `root` [N, S], which `after` shows merged."""
        if self._lineage is not None:
            root = root.unflatten(0, self.metadata_shape())
            self._lineage.merge(layer, before["position"], after["position"], root)

    def follow(self, lineage: Lineage | PartOfHeads) -> None:
        self._lineage = lineage

    def is_followed(self) -> bool:
        """Whether `note_merges` tells anyone."""
        return self._lineage is not None

    # -- the life of a cache -------------------------------------------------------------------------------------

    def stage(self, layer: int, staged: Staged) -> None:
        check_staged(self.spec, layer, staged)
        self._staged[layer] = staged

    def discard(self) -> None:
        self._staged.clear()

    def commit(self, first_frame: int, num_frames: int, execute: Execute = at_once) -> None:
        self._admit(first_frame, num_frames)
        self._advance(execute(lambda: self._take_in(self._compute())), first_frame, num_frames)

    @torch.no_grad()
    def prepare(self, first_frame: int, num_frames: int) -> Prepared:
        """The first half of a commit: all that can fail, computed aside; slots and counters stay as they are."""
        self._admit(first_frame, num_frames)
        return self._compute()

    @torch.no_grad()
    def finish(self, prepared: Prepared, first_frame: int, num_frames: int) -> None:
        """The second half: make what was prepared the current state."""
        self._advance(self._take_in(prepared), first_frame, num_frames)

    @property
    def staged(self) -> Mapping[int, Staged]:
        return dict(self._staged)

    def drop_from(self, first_frame: int) -> None:
        self.check_drop(first_frame)
        if first_frame >= self.next_frame:
            return
        removed = (self.next_frame - first_frame) * self.spec.tokens_per_frame
        self.filled = max(0, self.filled - removed)
        self.next_frame = first_frame
        self._staged.clear()

    def check_drop(self, first_frame: int) -> None:
        """Raise a ValueError if frames from `first_frame` on cannot be dropped any more."""
        if first_frame < self.exact_from:
            raise ValueError(
                f"frames {first_frame} to {self.next_frame - 1} cannot be rewritten: of them, those before frame "
                f"{self.exact_from} have been merged or evicted already; rewrite fewer frames or keep more recent ones"
            )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._staged.clear()

    def _counters(self) -> tuple[str, ...]:
        return (*super()._counters(), "first_frame", "next_frame", "exact_from")

    # -- internals -----------------------------------------------------------------------------------------------

    def _admit(self, first_frame: int, num_frames: int) -> None:
        """What of a commit is the host's: may these frames enter, and who follows them."""
        check_commit(self.spec, self._staged, first_frame, num_frames, self.next_frame)
        if self._lineage is not None:
            self._lineage.arrive(self._staged[0].positions)

    @torch.no_grad()
    def _compute(self) -> Prepared:
        return self._commit_layers(Scratch())

    def _advance(self, filled: int, first_frame: int, num_frames: int) -> None:
        """Count frames that have been taken in, which left `filled` slots."""
        offered, capacity = self.filled + num_frames * self.spec.tokens_per_frame, self.capacity_slots()
        if self.next_frame == 0:
            self.first_frame = self.exact_from = first_frame
        self.filled = filled
        self.next_frame = first_frame + num_frames
        if capacity is not None and offered > capacity:
            verbatim_frames = self.verbatim_slots() // self.spec.tokens_per_frame
            self.exact_from = max(self.exact_from, self.next_frame - verbatim_frames)
        self._staged.clear()

    def _commit_layers(self, scratch: Scratch) -> Prepared:
        return [self._commit_layer(layer, scratch) for layer in range(self.spec.num_layers)]

    def _commit_layer(self, layer: int, scratch: Scratch) -> tuple[Slots | Edit, dict[str, Tensor]]:
        slots, extras = self.old_slots(layer), dict(self._extras[layer])
        blocks = list(blocks_of(self.spec, self._staged[layer]))
        for block in blocks:
            result = self.absorb(layer, Joined(slots, self.encode(block)), block.k.shape[2], block, extras)
            if isinstance(result, Change):
                if len(blocks) == 1 and result.arrivals_stay:
                    return Edit(result, self._buffers[layer], scratch), extras
                result = result.done()
            slots = result
        return slots, extras

    @torch.no_grad()
    def _take_in(self, prepared: Prepared) -> int:
        """Make what a commit computed the current state of all layers; the number of slots now filled."""
        self._store(prepared)
        return prepared[0][0].size
