"""How attention reads what a cache keeps: decided once a rollout, by rules that are recorded with what they said."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastar import engines
from fastar.cache.base import CachePolicy, Packing
from fastar.engines.auto import reads_packed
from fastar.engines.packed import unfit
from fastar.sparsity import Dense, Selector


@dataclass(frozen=True)
class Reading:
    """Of one rollout.

    Attributes:
        packed: whether slots of 8 or 4 bits are read as they are stored, not from a copy in the compute dtype.
        ragged: whether each head reads the slots it has; else it reads as many as the longest, empty ones among them.
        slots: the first in words, and why; None: slots have 16 bits.
        heads: the second; None: all heads have the same number of slots.
    """

    packed: bool = False
    ragged: bool = False
    slots: str | None = None
    heads: str | None = None

    @property
    def record(self) -> dict[str, str | None]:
        """What a run notes."""
        return {"slots_read": self.slots, "heads_read": self.heads}


def reading_of(
    cache: CachePolicy, selector: Selector, engine: str, device: torch.device, dtype: torch.dtype
) -> Reading:
    """How a rollout reads `cache`, which is bound.

    Args:
        cache: what it asks for is `SlotCache.read_slots`.
        selector: of its self-attention. Plans put keys in an order, which is done to a copy with as many keys a head.
        engine: resolved name.
        device, dtype: that attention is computed on and in.

    Raises:
        ValueError: packed slots are asked for and cannot be read.
    """
    plans = None
    if not isinstance(selector, Dense):
        plans = f"{type(selector).__name__} puts keys in the order of its plans"
    packing, packed, slots = cache.packing, False, None
    if packing is not None:
        unfit_for = (
            packing.obstacle or plans or unfit(device, dtype, cache.spec.head_dim, packing.format.group)
        )
        packed, why = _reads_packed(packing, unfit_for, device)
        slots = f"{'packed' if packed else 'unpacked'}: {why}"
    if not cache.uneven:
        return Reading(packed, False, slots)
    if packed:
        return Reading(packed, True, slots, "each its own slots")
    if plans is None and not engines.get(engine).takes_lengths:
        plans = f"the engine {engine} takes no lengths"
    return Reading(packed, plans is None, slots, f"padded: {plans}" if plans else "each its own slots")


def _reads_packed(packing: Packing, unfit_for: str | None, device: torch.device) -> tuple[bool, str]:
    """Whether slots are read packed, and why. `unfit_for`: what makes it impossible, if anything does."""
    if packing.read == "unpacked":
        return False, "asked for"
    if packing.read == "packed":
        if unfit_for is not None:
            raise ValueError(f"slots cannot be read packed: {unfit_for}; set read_slots to auto or unpacked")
        return True, "asked for"
    return (False, unfit_for) if unfit_for is not None else reads_packed(device, packing.copy_bytes)
