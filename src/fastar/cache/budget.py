"""Hard budgets: from bytes to slots."""

from __future__ import annotations

from typing import Unpack

from fastar.cache.policy import SlotOptions, SlotPolicy


class BudgetOptions(SlotOptions, total=False):
    """Keyword arguments of `BudgetedPolicy`."""

    budget_share: float | None
    budget_frames: float | None
    budget_bytes: int | None
    history_frames: int


def budget_in_frames(
    share: float | None, frames: float | None, total_bytes: int | None, history_frames: int
) -> float | None:
    """The budget in dense frames; None if it was given in bytes. Exactly one of the three is to be given."""
    given = [budget for budget in (share, frames, total_bytes) if budget is not None]
    if len(given) != 1 or given[0] <= 0:
        raise ValueError(
            "give exactly one positive budget: budget_share, budget_frames or budget_bytes; got "
            f"{share}, {frames} and {total_bytes}"
        )
    return frames if share is None else share * history_frames


class BudgetedPolicy(SlotPolicy):
    """A policy with a fixed number of slots, the most that its budget can hold with all metadata.

    Exactly one way of giving the budget is to be used. It covers all layers, batch elements and heads, and the kept
    past only: the chunk that is being generated is not part of it.

    Args:
        budget_share: share of the bytes that a dense bfloat16 cache of `history_frames` latent frames takes.
        budget_frames: bytes of that many dense bfloat16 latent frames (need not be whole).
        budget_bytes: bytes.
        history_frames: what `budget_share` is a share of.
        slots: slot_bits, storage, quant_group: see `SlotPolicy`.
    """

    def __init__(
        self,
        *,
        budget_share: float | None = None,
        budget_frames: float | None = None,
        budget_bytes: int | None = None,
        history_frames: int = 192,
        **slots: Unpack[SlotOptions],
    ) -> None:
        super().__init__(**slots)
        self.budget_frames = budget_in_frames(budget_share, budget_frames, budget_bytes, history_frames)
        self.budget_bytes = budget_bytes
        self._capacity = 0

    def total_budget(self) -> int:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        assert self.budget_frames is not None
        return int(self.budget_frames * self.spec.dense_frame_bytes)

    def reserved_slots(self) -> int:
        """Slots that the policy promises to leave untouched (sink, recent), beyond which it needs room to work."""
        return 0

    def capacity_slots(self) -> int:
        if not self._capacity:
            spec, budget = self.spec, self.total_budget()
            fixed, each = self.extras_bytes(), self.slot_bytes()
            capacity = (budget // spec.num_layers - fixed) // each
            chunk = spec.chunk_frames * spec.tokens_per_frame
            needed = max(chunk, self.reserved_slots())
            if capacity < needed:
                least = spec.num_layers * (fixed + needed * each)
                raise ValueError(
                    f"the cache budget of {budget} bytes holds {max(0, capacity)} tokens a head, fewer than the "
                    f"{needed} of one chunk and the regions kept exact: give at least {least} bytes "
                    f"({least / spec.dense_frame_bytes:.1f} dense frames)"
                )
            self._capacity = capacity
        return self._capacity
