"""Hard budgets: from bytes to slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from fastar.cache.base import CacheSpec
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import SlotOptions


class BudgetOptions(SlotOptions, total=False):
    """Keyword arguments of `BudgetedPolicy`."""

    budget_share: float | None
    budget_frames: float | None
    budget_bytes: int | None
    history_frames: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes for the kept past of all layers, batch elements and heads; exactly one of the first three is to be given.

    Attributes:
        budget_share: share of the bytes that a dense bfloat16 cache of `history_frames` latent frames takes.
        budget_frames: bytes of that many dense bfloat16 latent frames (need not be whole).
        budget_bytes: bytes.
        history_frames: what `budget_share` is a share of.
    """

    budget_share: float | None = None
    budget_frames: float | None = None
    budget_bytes: int | None = None
    history_frames: int = 192

    def __post_init__(self) -> None:
        ways = (self.budget_share, self.budget_frames, self.budget_bytes)
        given = [way for way in ways if way is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError(
                "give exactly one positive budget: budget_share, budget_frames or budget_bytes; got "
                f"{self.budget_share}, {self.budget_frames} and {self.budget_bytes}"
            )

    def total(self, spec: CacheSpec) -> int:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        frames = self.budget_frames
        if frames is None:
            assert self.budget_share is not None
            frames = self.budget_share * self.history_frames
        return int(frames * spec.dense_frame_bytes)


class BudgetedPolicy(SlotPolicy):
    """A policy with a fixed number of slots, the most that its budget can hold with all metadata.

    The chunk that is being generated is not part of the budget.

    Args:
        budget_share, budget_frames, budget_bytes, history_frames: see `Budget`.
        slots: slot_bits, storage, quant_group, read_slots: see `SlotCache`.
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
        self.budget = Budget(
            budget_share=budget_share,
            budget_frames=budget_frames,
            budget_bytes=budget_bytes,
            history_frames=history_frames,
        )
        self._capacity = 0

    def total_budget(self) -> int:
        """The budget in bytes."""
        return self.budget.total(self.spec)

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
