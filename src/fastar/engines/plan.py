"""Block plans: which blocks of keys each block of queries reads, in a form every engine executes.

A plan first puts queries and keys into an order (tokens of one bucket next to each other), then cuts both
orders into blocks and says which block pairs are executed. Everything lives on the device of the tensors it
plans for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

WILDCARD = -1
"""Tag of a token that is in every bucket: it reads, and is read by, tokens of any tag."""


@dataclass(frozen=True)
class BlockPlan:
    """Executed block pairs of one attention call, per batch entry and head.

    Attributes:
        query_order: [B, H, Lq] int64 permutation; entry i is the original index of the i-th query in plan
            order. None: the queries already are in plan order.
        key_order: [B, H, Lk] int64 permutation or None, likewise. Empty slots, if any, come last.
        block_q, block_k: tokens per block; the last block of either axis may be shorter.
        block_mask: [B, H, ceil(Lq / block_q), ceil(Lk / block_k)] bool, True where a block pair is executed.
        live_keys: [B, H] number of keys that are not empty slots, or None if all are live.
        max_blocks: host-side upper bound on the key blocks of any query block, or None if unknown. With it
            the gather engines need no device-to-host copy to size their buffers.
        query_tags, key_tags: [B, H, Lq] and [B, H, Lk] int64 in original order, both or neither. Inside
            executed blocks a pair is attended only if its tags are equal or one is `WILDCARD`. The work done
            is still that of whole blocks.
        bucket_pairs: [B, H] pairs of a query and a cached key that share a bucket, in the executed blocks; None if the
            plan was not made of buckets. For measures alone.
        lengths: (Lq, Lk), needed where an order is None.
        block_lists: block_mask as lists: how many key blocks each query block reads, [B, H, query blocks] int32, and
            which, [B, H, query blocks, any] int32, ascending. None: made of the mask when they are first wanted.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    query_order: Tensor | None
    key_order: Tensor | None
    block_q: int
    block_k: int
    block_mask: Tensor
    live_keys: Tensor | None = None
    max_blocks: int | None = None
    query_tags: Tensor | None = None
    key_tags: Tensor | None = None
    bucket_pairs: Tensor | None = None
    lengths: tuple[int, int] | None = None
    block_lists: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block sizes must be at least 1, got {self.block_q} and {self.block_k}")
        if self.lengths is None and (self.query_order is None or self.key_order is None):
            raise ValueError("a plan without an order of its queries or keys needs lengths=(queries, keys)")
        orders = {"query": (self.query_order, self.num_queries), "key": (self.key_order, self.num_keys)}
        lead = next((x.shape[:2] for x, _ in orders.values() if x is not None), self.block_mask.shape[:2])
        for name, (order, length) in orders.items():
            if order is not None and tuple(order.shape) != (*lead, length):
                raise ValueError(f"{name}_order must be {(*lead, length)}, got {tuple(order.shape)}")
        expected = (*lead, -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_k))
        if tuple(self.block_mask.shape) != expected:
            raise ValueError(
                f"a plan of {self.num_queries} queries in blocks of {self.block_q} and {self.num_keys} keys in "
                f"blocks of {self.block_k} needs a block mask of {expected}, got {tuple(self.block_mask.shape)}"
            )
        if (self.query_tags is None) != (self.key_tags is None):
            raise ValueError("a plan takes query_tags and key_tags together: give both or neither")

    @property
    def num_queries(self) -> int:
        return self._length(self.query_order, 0)

    @property
    def num_keys(self) -> int:
        return self._length(self.key_order, 1)

    @property
    def query_index(self) -> Tensor:
        """[B, H, Lq] original index of the queries in plan order, also where `query_order` is None."""
        return self._index(self.query_order, self.num_queries)

    @property
    def key_index(self) -> Tensor:
        """[B, H, Lk] original index of the keys in plan order, also where `key_order` is None."""
        return self._index(self.key_order, self.num_keys)

    def of_heads(self, heads: slice) -> BlockPlan:
        """The same plan for some heads alone."""
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: x[:, heads] if isinstance(x, Tensor) else x for name, x in own.items()}
        if self.block_lists is not None:
            own["block_lists"] = (self.block_lists[0][:, heads], self.block_lists[1][:, heads])
        return BlockPlan(**own)

    def listed(self) -> tuple[Tensor, Tensor]:
        """`block_lists`, made of the mask once if they are None; what stands behind a count is not read."""
        return self._lists if self.block_lists is None else self.block_lists

    @cached_property
    def _lists(self) -> tuple[Tensor, Tensor]:
        counts = self.block_mask.sum(-1, dtype=torch.int32)
        ordered = torch.argsort(self.block_mask.logical_not().to(torch.uint8), dim=-1, stable=True)
        return counts, ordered.to(torch.int32)

    @cached_property
    def no_blocks(self) -> Tensor:
        """Counts like those of `listed`, all zero."""
        return torch.zeros(self.block_mask.shape[:3], dtype=torch.int32, device=self.block_mask.device)

    def dealt_out(self, first: int, parts: int) -> tuple[Tensor, Tensor]:
        """`listed` of the query blocks from `first` on, each list dealt out to `parts` shorter ones, for B = 1.

        Returns:
            int32 counts [parts, H, query blocks - first] and blocks [parts, H, query blocks - first, any], ascending.

        Raises:
            ValueError: a plan of several batch entries.
        """
        if self.block_mask.shape[0] > 1:
            raise ValueError(f"lists of one batch entry are dealt out, not of {self.block_mask.shape[0]}")
        if (first, parts) not in self._dealt:
            counts, indices = (x[0, :, first:] for x in self.listed())
            most = indices.shape[2] if self.max_blocks is None else min(self.max_blocks, indices.shape[2])
            part = torch.arange(parts, dtype=torch.int32, device=counts.device)[:, None, None]
            dealt = pad(indices[..., :most], (0, -most % parts)).unflatten(2, (-1, parts))
            self._dealt[first, parts] = (
                (counts + (parts - 1) - part) // parts,
                dealt.permute(3, 0, 1, 2).contiguous(),
            )
        return self._dealt[first, parts]

    @cached_property
    def _dealt(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def on_ordered_keys(self) -> BlockPlan:
        """The same plan for keys that lie in its order already."""
        if self.key_order is None:
            return self
        tags = None if self.key_tags is None else self.key_tags.gather(2, self.key_order)
        lengths = (self.num_queries, self.num_keys)
        return replace(self, key_order=None, key_tags=tags, lengths=lengths, block_lists=self.listed())

    @cached_property
    def in_order(self) -> BlockPlan:
        """The same plan for queries and keys that both lie in its order already."""
        plan = self.on_ordered_keys
        if plan.query_order is None:
            return plan
        tags = None if plan.query_tags is None else plan.query_tags.gather(2, plan.query_order)
        lengths = (self.num_queries, self.num_keys)
        return replace(plan, query_order=None, query_tags=tags, lengths=lengths, block_lists=self.listed())

    def executed_pairs(self) -> Tensor:
        """Query-key pairs in the executed blocks, [B, H] int64; empty slots and padding do not count."""
        rows = _block_sizes(self.block_mask.shape[2], self.block_q, self._full_length(self.num_queries))
        columns = _block_sizes(self.block_mask.shape[3], self.block_k, self._live_length())
        per_row = (self.block_mask * columns[:, :, None, :]).sum(-1)
        return (per_row * rows).sum(-1)

    def dense_pairs(self) -> Tensor:
        """Pairs that dense attention executes on the same live keys, [B, H] int64."""
        return self._live_length() * self.num_queries

    def density(self) -> Tensor:
        """Executed pairs / dense pairs, [B, H] float32."""
        return self.executed_pairs() / self.dense_pairs().clamp(min=1)

    def token_mask(self) -> Tensor:
        """Attended pairs in original order, [B, H, Lq, Lk] bool; quadratic, for definitions and tests."""
        mask = self.block_mask.repeat_interleave(self.block_q, dim=2).repeat_interleave(self.block_k, dim=3)
        mask = mask[:, :, : self.num_queries, : self.num_keys]
        if self.live_keys is not None:
            place = torch.arange(self.num_keys, device=mask.device)
            mask = mask & (place < self.live_keys[..., None, None])
        if self.query_order is not None:
            mask = mask.gather(2, inverse_order(self.query_order)[..., :, None].expand_as(mask))
        if self.key_order is not None:
            mask = mask.gather(3, inverse_order(self.key_order)[..., None, :].expand_as(mask))
        if self.query_tags is not None and self.key_tags is not None:
            mask = mask & share_tag(self.query_tags[..., :, None], self.key_tags[..., None, :])
        return mask

    def _length(self, order: Tensor | None, axis: int) -> int:
        if order is not None:
            return order.shape[2]
        assert self.lengths is not None  # see __post_init__
        return self.lengths[axis]

    def _index(self, order: Tensor | None, length: int) -> Tensor:
        if order is not None:
            return order
        places = torch.arange(length, device=self.block_mask.device)
        return places.expand(*self.block_mask.shape[:2], length)

    def _full_length(self, length: int) -> Tensor:
        return torch.full(self.block_mask.shape[:2], length, device=self.block_mask.device)

    def _live_length(self) -> Tensor:
        return self._full_length(self.num_keys) if self.live_keys is None else self.live_keys


def share_tag(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether tokens may see each other: equal tags, or either is `WILDCARD`. Broadcasts its arguments."""
    return (queries == keys) | (queries == WILDCARD) | (keys == WILDCARD)


def inverse_order(order: Tensor) -> Tensor:
    """Inverse of permutations along the last dimension."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def take_rows(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, L, D] with its tokens in `order` [B, H, N], as it is if that is None; x is copied if it is strided."""
    if order is None:
        return x
    batch, heads, length, width = x.shape
    # whole rows at once, which `gather` with an expanded index does not
    offsets = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    rows = x.reshape(-1, width).index_select(0, (order + offsets).flatten())
    return rows.view(batch, heads, -1, width)


def _block_sizes(blocks: int, size: int, length: Tensor) -> Tensor:
    """Tokens in each of `blocks` blocks of `size` if only the first `length` exist: [B, H, blocks]."""
    starts = torch.arange(blocks, device=length.device) * size
    return (length[..., None] - starts).clamp(0, size)
