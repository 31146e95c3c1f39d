"""From token buckets to block plans: orders, shared-bucket counts, centroid scores, and a density target.

Plan order of the keys: the current chunk first (always executed, so it should fill whole blocks), then cached
keys by bucket, then empty slots. All of it is sorts, searches and sums on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from fastar.engines.plan import WILDCARD, BlockPlan, inverse_order
from fastar.sparsity import fused
from fastar.sparsity.base import SelectRequest, check_choice

DensityOf = Literal["all", "past"]
_LAST = 2**16  # follows every bucket (`fastar.ann.base.Bucketizer`)


@dataclass(frozen=True)
class KeyLayout:
    """Plan order of the keys.

    Attributes:
        order: [B, H, Lk] permutation: current chunk, cached keys by bucket, empty slots.
        buckets: [B, H, Lk - current] buckets of the cached keys in that order; of empty slots the largest id.
        live: [B, H] keys that are not empty slots, current chunk included.
        current: keys of the current chunk.
    """

    order: Tensor
    buckets: Tensor
    live: Tensor
    current: int


def lay_out_keys(buckets: Tensor, log_count: Tensor | None, num_current: int) -> KeyLayout:
    """Order keys for a plan.

    Args:
        buckets: [B, H, Lk] int64 bucket of each key, >= 0 or `WILDCARD`; the last `num_current` are the
            current chunk's.
        log_count: [B, H, Lk], -inf for an empty slot, or None.
        num_current: keys of the current chunk, none of them empty.
    """
    cached = buckets.shape[2] - num_current
    live = torch.full(buckets.shape[:2], buckets.shape[2], device=buckets.device)
    past = buckets[..., :cached]
    if log_count is not None:
        empty = log_count.expand(buckets.shape)[..., :cached] == -torch.inf
        past = past.masked_fill(empty, _LAST)
        live = live - empty.sum(-1)
    past, order = sort_by_bucket(past)
    current = torch.arange(cached, buckets.shape[2], device=buckets.device)
    current = current.expand(*buckets.shape[:2], num_current)
    return KeyLayout(torch.cat([current, order], dim=-1), past, live, num_current)


def sort_by_bucket(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Buckets int64 [B, H, L], `WILDCARD` to 2^16, in ascending order, and that order, int64 [B, H, L]; stable.

    A GPU sorts long rows one after another, each in many small kernels: there all are sorted as one.
    """
    if buckets.device.type != "cuda":
        return torch.sort(buckets, dim=-1, stable=True)
    batch, heads, length = buckets.shape
    rows = torch.arange(batch * heads, device=buckets.device).view(batch, heads, 1)
    apart = rows * (_LAST - WILDCARD + 1) - WILDCARD
    keys, order = torch.sort((buckets + apart).to(torch.int32).flatten(), stable=True)
    return keys.view_as(buckets) - apart, order.view_as(buckets) - rows * length


def shared_pairs(
    query_buckets: Tensor, layout: KeyLayout, block_q: int, block_k: int, *, wildcards: bool = True
) -> Tensor:
    """Same-bucket pairs of queries and cached keys in each block pair: [B, H, query blocks, key blocks].

    Equal buckets are one run of the sorted keys, so that the count is the overlap of runs with blocks: no
    histogram over buckets, however many there are.

    Args:
        query_buckets: [B, H, Lq] in plan order; `WILDCARD` shares with every key.
        wildcards: whether there may be any `WILDCARD`.
    """
    starts, ends, wild = _runs_of(query_buckets, layout, wildcards)
    if query_buckets.device.type == "cuda":
        num_keys = layout.order.shape[2]
        return fused.shared_pairs(starts, ends, wild, num_keys, layout.current, block_q, block_k)

    num_blocks = -(-layout.order.shape[2] // block_k)
    edges = torch.arange(num_blocks, device=ends.device, dtype=torch.int32) * block_k - layout.current
    first, size = edges.clamp(min=0), (edges + block_k).clamp(min=0) - edges.clamp(min=0)

    def up_to(place: Tensor) -> Tensor:
        """Cached keys of each block that lie before a place in the sorted order."""
        return (place[..., None] - first).clamp(min=0).minimum(size)

    counts = up_to(ends) - up_to(starts)
    if wild is not None:
        counts = counts + up_to(wild)
    return _cut(counts, dim=2, size=block_q).sum(3)


def _runs_of(
    query_buckets: Tensor, layout: KeyLayout, wildcards: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the cached keys of each query's bucket begin and end, how many wildcards it reads besides: [B, H, Lq]."""
    runs = layout.buckets.contiguous()
    starts = torch.searchsorted(runs, query_buckets, out_int32=True)
    ends = torch.searchsorted(runs, query_buckets, out_int32=True, right=True)
    if not wildcards:
        return starts, ends, None
    reads_all = query_buckets == WILDCARD
    everything = (layout.live - layout.current)[..., None].int()
    # wildcard keys sort before every bucket; a query with a bucket reads them besides its own run
    wild = torch.searchsorted(runs, torch.full_like(query_buckets, WILDCARD), out_int32=True, right=True)
    return (
        starts.masked_fill(reads_all, 0),
        torch.where(reads_all, everything, ends),
        wild.masked_fill(reads_all, 0),
    )


def centroid_scores(
    request: SelectRequest, query_order: Tensor, layout: KeyLayout, block_q: int, block_k: int
) -> Tensor:
    """Mean logit of each block pair's queries and live keys, [B, H, query blocks, key blocks] float32."""
    q, k, log_count = request.q, request.k, request.log_count
    queries = _block_means(q, query_order, torch.full_like(layout.live, q.shape[2]), block_q)
    keys = _block_means(k, layout.order, layout.live, block_k)
    logits = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if log_count is None:
        return logits
    counts = log_count.expand(k.shape[:3]).clamp(min=0)[..., None]  # empty slots are not averaged
    return logits + _block_means(counts, layout.order, layout.live, block_k).transpose(-1, -2)


@dataclass(frozen=True)
class ChosenBlocks:
    """Executed blocks.

    Attributes:
        mask: [B, H, query blocks, key blocks] bool.
        most: upper bound on the key blocks of any query block.
        lists: the mask as `BlockPlan.block_lists`, where it was made together with them.
    """

    mask: Tensor
    most: int
    lists: tuple[Tensor, Tensor] | None = None


def choose_blocks(
    scores: Tensor, layout: KeyLayout, block_k: int, density: float, of: DensityOf = "all"
) -> ChosenBlocks:
    """The best-scored key blocks of every query block, current chunk first, up to a density.

    Every query block gets the same number of key blocks, `block_quota`, so that the work is even and its bound known on
    the host.

    Args:
        scores: [B, H, query blocks, key blocks]; higher is chosen first, ties go to the earlier block.
        density, of: see `block_quota`.
    """
    least, blocks = max(1, -(-layout.current // block_k)), scores.shape[-1]
    most = block_quota(blocks, density, least, of)
    if scores.device.type == "cuda":
        quotas = block_quotas(blocks, density, least, scores.device, of)
        mask, lists = fused.choose_blocks(scores, layout.live, quotas, layout.current, block_k)
        return ChosenBlocks(mask, most, lists)
    starts = torch.arange(scores.shape[-1], device=scores.device) * block_k
    forced, exists = starts < layout.current, starts < layout.live[..., None]
    scores = scores.masked_fill(~exists[:, :, None], -torch.inf).masked_fill(forced, torch.inf)
    ranked = torch.argsort(scores, dim=-1, descending=True, stable=True)
    rank = inverse_order(ranked)
    beside = least if of == "past" else 0  # `block_quota`, of every head
    quota = ((exists.sum(-1) - beside).clamp(min=0).double() * density + 0.5).floor() + beside
    quota = quota.clamp(min=least)
    mask = (rank < quota[..., None, None]) & exists[:, :, None]
    return ChosenBlocks(mask, most)


def block_quota(blocks: int, density: float, least: int, of: DensityOf = "all") -> int:
    """How many of `blocks` live key blocks a query block reads.

    Args:
        density: of the blocks, rounded to a whole number, in (0, 1].
        least: those of the current chunk, which are always read.
        of: what `density` is a share of: `all` blocks, the current chunk's counted, which are read even where they
            alone exceed it; or the `past`, the blocks beside them.
    """
    if of == "past":
        return least + math.floor(max(0, blocks - least) * density + 0.5)
    return max(least, math.floor(blocks * density + 0.5))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # for callers of either mode
def block_quotas(
    blocks: int, density: float, least: int, device: torch.device, of: DensityOf = "all"
) -> Tensor:
    """`block_quota` of each number of blocks, 0 to `blocks`: int32, kept, as copying makes the host wait."""
    chosen = [block_quota(count, density, least, of) for count in range(blocks + 1)]
    return torch.tensor(chosen, dtype=torch.int32, device=device)


def aimed_density(density: float, of: DensityOf, current: int, keys: int) -> float:
    """Executed / dense pairs that a density aims for, where `current` of the `keys` are the chunk's."""
    return density if of == "all" else (current + density * (keys - current)) / keys


def build_plan(
    query_order: Tensor,
    layout: KeyLayout,
    block_mask: Tensor,
    block_q: int,
    block_k: int,
    *,
    max_blocks: int | None = None,
    tags: tuple[Tensor, Tensor] | None = None,
    bucket_pairs: Tensor | None = None,
    lists: tuple[Tensor, Tensor] | None = None,
) -> BlockPlan:
    """A `BlockPlan` over a key layout, with (query, key) tags if only equal ones may attend to each other.

    The tags of the current chunk's keys become wildcards: they are always attended to.
    """
    query_tags, key_tags = tags or (None, None)
    if key_tags is not None:
        cached = key_tags.shape[2] - layout.current
        always = torch.full_like(key_tags[..., cached:], WILDCARD)
        key_tags = torch.cat([key_tags[..., :cached], always], dim=-1)
    return BlockPlan(
        query_order=query_order,
        key_order=layout.order,
        block_q=block_q,
        block_k=block_k,
        block_mask=block_mask,
        live_keys=layout.live,
        max_blocks=max_blocks,
        query_tags=query_tags,
        key_tags=key_tags,
        bucket_pairs=bucket_pairs,
        block_lists=lists,
    )


def check_density(density: float | None, of: str = "all") -> None:
    """Raise a ValueError unless `density` is None or in (0, 1], and `of` known."""
    check_choice("density_of", of, ("all", "past"))
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"density is a share of the dense pairs in (0, 1], got {density}")


def check_block_sizes(block_q: int, block_k: int) -> None:
    """Raise a ValueError unless both are positive."""
    if min(block_q, block_k) < 1:
        raise ValueError(f"block sizes must be at least 1, got block_q={block_q} and block_k={block_k}")


def _cut(x: Tensor, *, dim: int, size: int) -> Tensor:
    """Split a dimension into blocks of `size`, the last one filled with zeros: [..., blocks, size, ...]."""
    missing = -x.shape[dim] % size
    padded = pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    return padded.unflatten(dim, (-1, size))


def _block_means(x: Tensor, order: Tensor, live: Tensor, size: int) -> Tensor:
    """Mean of each block of `size` tokens in `order`, over the first `live`: [B, H, blocks, D] float32.

    One fused gather and sum: a permuted copy of all keys would cost as much as a tenth of the attention.
    """
    if x.device.type == "cuda":
        return fused.block_means(x, order, live, size)
    batch, heads, length, dim = x.shape
    offsets = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    rows = _cut(order + offsets, dim=2, size=size)
    places = torch.arange(rows.shape[2] * size, device=x.device).view(-1, size)
    counted = places < live[..., None, None]
    weights = counted / counted.sum(-1, keepdim=True).clamp(min=1)
    weights = weights.flatten(0, 2).to(x.dtype)
    means = embedding_bag(rows.flatten(0, 2), x.reshape(-1, dim), mode="sum", per_sample_weights=weights)
    return means.view(batch, heads, -1, dim).float()
