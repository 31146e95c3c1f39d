"""Attention over slots of 8 or 4 bits as they are stored: no copy of the cache in the compute dtype is ever made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar.cache.base import StoredView
from fastar.engines.packed import HeadRows, Packed, attend_packed, beside_slots
from fastar.engines.plan import BlockPlan


@dataclass(frozen=True)
class PackedPast:
    """A layer's slots where the cache has them.

    Attributes:
        stored: keys and values as the cache has them; `keys` and `values` are the same for the kernel.
        log_count: float32 [B, H, S], laid out as the slots are; None if all are 0.
        rows: where heads have slots of their own; the shapes above are then [1, 1, R, ...].
    """

    stored: StoredView
    keys: Packed
    values: Packed
    log_count: Tensor | None
    rows: HeadRows | None = None

    @staticmethod
    def of(stored: StoredView) -> PackedPast:
        """Those of a cache."""
        rows = None
        if stored.first is not None and stored.lengths is not None:
            rows = HeadRows(stored.first, stored.lengths)
        keys, values = (
            Packed(*(stored.slots[f"{name}{part}"] for part in ("", "_low", "_step")))
            for name in ("key", "value")
        )
        counts = stored.log_count
        counts = None if counts is None else beside_slots(counts, keys)
        return PackedPast(stored, keys, values, counts, rows)


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
        """S, of the head that has most."""
        return self.past.stored.size

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
        stored = self.past.stored.padded()
        k, v = stored.unpacked(self.k.dtype)
        counts = stored.log_count
        if counts is not None:
            counts = torch.cat([counts, counts.new_zeros(self.k.shape[:3])], dim=2)
        return torch.cat([k, self.k], dim=2), torch.cat([v, self.v], dim=2), counts

    def attend(self, q: Tensor, plan: BlockPlan | None, engine: str) -> Tensor:
        """Attention of q [B, H, Lq, D] over slots and current tokens: [B, H, Lq, D]. No plan, whatever the engine."""
        assert plan is None
        past = self.past
        return attend_packed(
            q, past.keys, past.values, self.k, self.v, log_count=past.log_count, rows=past.rows
        )[0]

    def until(self, keys: int) -> PackedKeys:
        """The first `keys` of the current ones, with all that is cached."""
        return replace(self, k=self.k[:, :, :keys], v=self.v[:, :, :keys])
