"""Attention over slots of 8 or 4 bits as they are stored: no copy of the cache in the compute dtype is ever made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar.cache.base import CachePolicy, StoredView
from fastar.engines.auto import reads_packed
from fastar.engines.packed import Packed, attend_packed, beside_slots, unfit
from fastar.engines.plan import BlockPlan
from fastar.sparsity import Dense, Selector


@dataclass(frozen=True)
class Reading:
    """How attention reads slots of 8 or 4 bits, and why so."""

    packed: bool
    reason: str

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'unpacked'}: {self.reason}"


def reading_of(
    cache: CachePolicy, selector: Selector, device: torch.device, dtype: torch.dtype
) -> Reading | None:
    """How a rollout reads the slots of `cache`, decided once; None if there is nothing to decide.

    Args:
        cache: bound. What it asks for is `SlotPolicy.read_slots`.
        selector: of its self-attention: plans put keys in an order, which is done to a copy.
        device, dtype: that attention is computed on and in.

    Raises:
        ValueError: packed slots are asked for and cannot be read.
    """
    packing, head_dim = cache.packing, cache.spec.head_dim
    if packing is None:
        return None
    if packing.read == "unpacked":
        return Reading(False, "asked for")
    reason = packing.obstacle or unfit(device, dtype, head_dim, packing.format.group)
    if not isinstance(selector, Dense):
        reason = f"{type(selector).__name__} puts keys in the order of its plans"
    if packing.read == "packed":
        if reason is not None:
            raise ValueError(f"slots cannot be read packed: {reason}; set read_slots to auto or unpacked")
        return Reading(True, "asked for")
    return (
        Reading(False, reason) if reason is not None else Reading(*reads_packed(device, packing.copy_bytes))
    )


@dataclass(frozen=True)
class PackedPast:
    """A layer's slots where the cache has them.

    Attributes:
        stored: keys and values as the cache has them; `keys` and `values` are the same for the kernel.
        log_count: float32 [B, H, S], laid out as the slots are; None if all are 0.
    """

    stored: StoredView
    keys: Packed
    values: Packed
    log_count: Tensor | None

    @staticmethod
    def of(stored: StoredView) -> PackedPast:
        """Those of a cache."""
        keys, values = (
            Packed(*(stored.slots[f"{name}{part}"] for part in ("", "_low", "_step")))
            for name in ("key", "value")
        )
        counts = stored.log_count
        return PackedPast(stored, keys, values, None if counts is None else beside_slots(counts, keys))


@dataclass(frozen=True)
class PackedKeys:
    """A layer's attended keys in two places: slots as they are stored, and the current tokens in the compute dtype.

    Attributes:
        past: S slots.
        k, v: [B, H, L, D] of the current tokens, to be written.
    """

    past: PackedPast
    k: Tensor
    v: Tensor

    @property
    def head_dim(self) -> int:
        """D."""
        return self.v.shape[-1]

    @property
    def cached(self) -> int:
        """S."""
        return self.past.stored.slots.size

    @property
    def total(self) -> int:
        """S + L."""
        return self.cached + self.k.shape[2]

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current tokens."""
        return self.k, self.v

    def seen(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, S + L, D] and log-counts, unpacked for those who look on."""
        k, v = self.past.stored.unpacked(self.k.dtype)
        counts = self.past.log_count
        if counts is not None:
            counts = torch.cat([counts, counts.new_zeros(self.k.shape[:3])], dim=2)
        return torch.cat([k, self.k], dim=2), torch.cat([v, self.v], dim=2), counts

    def attend(self, q: Tensor, plan: BlockPlan | None, engine: str) -> Tensor:
        """Attention of q [B, H, Lq, D] over slots and current tokens: [B, H, Lq, D]. No plan, whatever the engine."""
        assert plan is None
        past = self.past
        return attend_packed(q, past.keys, past.values, self.k, self.v, log_count=past.log_count)[0]

    def until(self, keys: int) -> PackedKeys:
        """The first `keys` of the current ones, with all that is cached."""
        return replace(self, k=self.k[:, :, :keys], v=self.v[:, :, :keys])
