"""What attention reads of one layer in a pass: the slots of the cache, then the current tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar import engines
from fastar.attention.packed import PackedKeys, PackedPast
from fastar.cache.base import CachePolicy
from fastar.engines.augmented import write_log_counts
from fastar.engines.plan import BlockPlan
from fastar.engines.rows import gather_into, put_back


@dataclass
class WorkingKeys:
    """A layer's attended keys in the compute dtype: what the cache keeps, then room for the current tokens.

    Where heads have unequally many slots and the engine reads no more than these, it is the other way round: the
    current tokens come first, and what a head reads ends with its slots.

    Attributes:
        k: [B, H, S + L, W]. Where W exceeds D, the rest carries the log-counts (`fastar.engines.augmented`).
        v: [B, H, S + L, D].
        log_count: float32 [B, H, S + L], or None if all are 0; what `k` carries is the same.
        cached: S, slots beside the current tokens.
        positions: int64 [B, H, S, 3] that the cached keys are roped to; None if there are none.
        origins: the same, where the tokens stand in the video.
        lengths: int32 [B, H], keys that each head reads, the first ones; behind them is something finite. None: all.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor | None
    cached: int
    positions: Tensor | None
    origins: Tensor | None
    lengths: Tensor | None = None

    @property
    def head_dim(self) -> int:
        """D."""
        return self.v.shape[-1]

    @property
    def own_keys(self) -> Tensor:
        """The keys without what carries their log-counts: [B, H, S + L, D]."""
        return self.k[..., : self.head_dim]

    @property
    def total(self) -> int:
        """S + L."""
        return self.k.shape[2]

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, L, W] and values [B, H, L, D] of the current tokens, to be written."""
        own = slice(self.cached, None) if self.lengths is None else slice(self.total - self.cached)
        return self.k[:, :, own], self.v[:, :, own]

    def seen(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, S + L, D] and log-counts, the current tokens last, for those who look on."""
        if self.lengths is None:
            return self.own_keys, self.v, self.log_count
        assert self.log_count is not None  # which says what is behind a head's slots
        k, v, log_count = (
            x.roll(self.cached - self.total, 2) for x in (self.own_keys, self.v, self.log_count)
        )
        return k, v, log_count

    def attend(self, q: Tensor, plan: BlockPlan | None, engine: str) -> Tensor:
        """Attention of q [B, H, Lq, W] over these keys: [B, H, Lq, D]. Queries of D leave out what keys carry."""
        keys, log_count, head_dim = self.own_keys, self.log_count, None
        if q.shape[-1] > self.head_dim:
            keys, log_count, head_dim = self.k, None, self.head_dim
        return engines.attend(
            q, keys, self.v, log_count=log_count, plan=plan, lengths=self.lengths, head_dim=head_dim, engine=engine,
        )[0]  # fmt: skip

    def until(self, keys: int) -> WorkingKeys:
        """The first `keys` of the current ones, with all that is cached."""
        stop = self.cached + keys
        if stop == self.k.shape[2]:
            return self
        if self.lengths is not None:
            own = self.total - self.cached
            assert self.log_count is not None
            k, v, counts = (
                torch.cat([x[:, :, :keys], x[:, :, own:]], dim=2) for x in (self.k, self.v, self.log_count)
            )
            return replace(self, k=k, v=v, log_count=counts, lengths=self.lengths - (own - keys))
        log_count = None if self.log_count is None else self.log_count[:, :, :stop]
        return replace(self, k=self.k[:, :, :stop], v=self.v[:, :, :stop], log_count=log_count)


@dataclass
class OrderedKeys:
    """Working keys in the order of a plan, which begins with the current tokens.

    Attributes:
        plan: the one that the order is of.
        keys: k, v and log_count in that order; positions and origins as they were.
    """

    plan: BlockPlan
    keys: WorkingKeys

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current tokens."""
        count = self.keys.k.shape[2] - self.keys.cached
        return self.keys.k[:, :, :count], self.keys.v[:, :, :count]

    def attend(self, q: Tensor, engine: str, *, q_in_order: bool = False) -> Tensor:
        """Attention of q [B, H, Lq, W] by the plan: [B, H, Lq, D]. `q_in_order`: q is, the result not."""
        if not q_in_order:
            return self.keys.attend(q, self.plan.on_ordered_keys, engine)
        out = self.keys.attend(q, self.plan.in_order, engine)
        return out if self.plan.query_order is None else put_back(out, self.plan.query_order)


class WorkingMemory:
    """The working keys of all layers, filled once a chunk and layer, at addresses that stay while sizes do.

    They lie in the cache itself if it has room for them (`CachePolicy.room`), else in a copy; `packed` slots stay where
    they are, and the current tokens are apart. Layers whose plans are kept for later passes have another copy, in the
    order of the plan: what is cached is put in order once a chunk.

    Args:
        cache: whose past is read.
        key_width: W, as the attention engine wants it.
        packed: whether slots of 8 or 4 bits are read as they are stored (`fastar.attention.packed`).
        ragged: whether the engine reads as many slots as each head has.
    """

    def __init__(
        self, cache: CachePolicy, key_width: int, *, packed: bool = False, ragged: bool = False
    ) -> None:
        self.cache, self.key_width, self.packed, self.ragged = cache, key_width, packed, ragged
        self._pasts: dict[int, PackedPast] = {}
        self._current: dict[int, WorkingKeys] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._ordered: dict[int, OrderedKeys] = {}
        self._ordered_copies: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Read the cache once more in the next pass."""
        self._current.clear()
        self._pasts.clear()
        self._ordered.clear()

    def of(self, layer: int, like: Tensor) -> WorkingKeys | PackedKeys:
        """The layer's past, with room for as many tokens as `like` [B, H, L, D] has, in its dtype."""
        if self.packed:
            past = self._pasts.get(layer)
            if past is None:
                past = self._pasts[layer] = PackedPast.of(self.cache.stored(layer))
            self._check(like)
            return PackedKeys(past, like.new_empty(like.shape), like.new_empty(like.shape))
        working = self._current.get(layer)
        if working is None or working.k.shape[2] - working.cached != like.shape[2]:
            working = self._current[layer] = self._fill(layer, like)
        return working

    def ordered(self, layer: int, working: WorkingKeys, plan: BlockPlan) -> OrderedKeys:
        """The layer's `working` keys in the order of `plan`, put there when it is first seen, the current ones too."""
        kept = self._ordered.get(layer)
        if kept is None or kept.plan is not plan:
            assert plan.key_order is not None
            k, v = self._room_for(self._ordered_copies, layer, working.k.shape[2], working.v)
            gather_into(k, working.k, plan.key_order)
            gather_into(v, working.v, plan.key_order)
            counts = working.log_count
            counts = None if counts is None else counts.gather(2, plan.key_order)
            kept = OrderedKeys(plan, replace(working, k=k, v=v, log_count=counts))
            self._ordered[layer] = kept
        return kept

    def nbytes(self) -> int:
        """Bytes of all copies, beside what the cache has."""
        copies = [*self._copies.values(), *self._ordered_copies.values()]
        return sum(x.nbytes for pair in copies for x in pair)

    def _check(self, like: Tensor) -> None:
        """Raise a ValueError if `like` is not what the cache's slots go with."""
        spec = self.cache.spec
        expected = (spec.batch, spec.num_heads, like.shape[2], spec.head_dim)
        if tuple(like.shape) != expected:
            raise ValueError(
                f"keys must be {expected} (batch, heads, tokens, head dim), got {tuple(like.shape)}"
            )

    def _fill(self, layer: int, like: Tensor) -> WorkingKeys:
        self._check(like)
        room, view = self.cache.room(layer, like.shape[2]), self.cache.view(layer)
        cached, tokens = view.k.shape[2], like.shape[2]
        lengths = None if view.lengths is None or not self.ragged else view.lengths + tokens
        past = slice(cached) if lengths is None else slice(tokens, None)
        if room is None:
            k, v = self._room_for(self._copies, layer, cached + tokens, like)
            k[:, :, past, : like.shape[3]], v[:, :, past] = view.k, view.v
        else:
            k, v = room.k, room.v
        log_count = None
        if cached and view.log_count is not None:
            log_count = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
            log_count[:, :, past] = view.log_count
        if k.shape[-1] > like.shape[3]:
            k[..., like.shape[3] :].zero_()
        if k.shape[-1] > like.shape[3] and log_count is not None:
            write_log_counts(k, log_count, like.shape[3])
        origins = view.positions if view.origins is None else view.origins
        return WorkingKeys(k, v, log_count, cached, view.positions, origins, lengths)

    def _room_for(
        self, copies: dict[int, tuple[Tensor, Tensor]], layer: int, total: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of this layer and as many tokens; their content is left from before."""
        lead, kept = like.shape[:2], copies.get(layer)
        if kept is None or kept[1].shape[:3] != (*lead, total) or kept[1].dtype != like.dtype:
            kept = (like.new_empty(*lead, total, self.key_width), like.new_empty(*lead, total, like.shape[3]))
            copies[layer] = kept
        return kept
