"""Torch's scaled_dot_product_attention: fused kernels on CPU and CUDA, with log-counts and block plans.

Two engines share this file and differ only in how a log-count reaches the kernel.

- `augmented` carries it in extra head coordinates on every device, so that the kernels run as they are.
- `sdpa` does so on CUDA, where an additive mask costs 1.6 to 5 times as much, and adds one mask row per head
  on CPU, where the flash kernel adds it inside its loop for nothing and the copies of the augmented head
  would be the cost.

Only fused kernels are allowed, by name: a call that none of them takes raises instead of running unfused.
They want one head width for q, k and v (CUDA's flash kernel and the CPU kernel both do), so a narrower v is
padded; on CPU, unequal widths would run unfused at two and a half times the time.

A block plan runs by gathering the key blocks of each query block into one batch padded to the longest block
list, so that executed work falls with density on any device. Gathers go through a bounded scratch, a few
query blocks at a time: on CPU a large fresh buffer costs more in page faults than the attention itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastar.engines.augmented import augment_keys, augment_queries, augmented_width, pad_width
from fastar.engines.plan import BlockPlan, inverse_order, share_tag
from fastar.engines.registry import AttentionCall, Engine

_FUSED = {
    "cpu": [SDPBackend.FLASH_ATTENTION],
    # flash takes no float32 and no mask
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}
_SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 2**30}
_WIDTH_MULTIPLE = 8  # what CUDA's kernels align head widths to; CPU does not mind


def _run(call: AttentionCall, *, augment_on: frozenset[str]) -> tuple[Tensor, Tensor | None]:
    augment = call.q.device.type in augment_on
    if call.plan is not None:
        return _planned(call, call.plan, augment), None
    if call.log_count is None:
        return _unbiased(call.q, call.k, call.v, call.scale), None
    alive = (call.log_count > -torch.inf).any(-1)[..., None, None]
    out = _biased(call.q, call.k, call.v, call.log_count, call.scale, augment)
    return out.masked_fill(~alive, 0.0), None


def _unbiased(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The fused kernel on q [B, H, Lq, D], k [B, H, Lk, D] and v [B, H, Lk, Dv], in one common width."""
    width, value_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if q.device.type == "cuda":
        width = -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    q, k, v = (x if x.shape[-1] == width else pad_width(x, width) for x in (q, k, v))
    with sdpa_kernel(_FUSED[q.device.type]):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :value_dim]


def _biased(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, augment: bool, allowed: Tensor | None = None
) -> Tensor:
    """As `_unbiased`, with bias [B, H, Lk] in the logits, over the `allowed` [B, H, Lq, Lk] pairs alone."""
    if augment:
        width = max(augmented_width(q.shape[-1], _WIDTH_MULTIPLE), v.shape[-1])
        return _unbiased(augment_queries(q, width), augment_keys(k, bias, width), v, scale, allowed)
    mask = bias[..., None, :]
    return _unbiased(q, k, v, scale, mask if allowed is None else mask.where(allowed, -torch.inf))


def _planned(call: AttentionCall, plan: BlockPlan, augment: bool) -> Tensor:
    query_rows, key_rows, unused = _gather_lists(plan)
    q, k, v = (x.reshape(-1, x.shape[-1]) for x in (call.q, call.k, call.v))
    if call.log_count is None:
        bias = torch.zeros(key_rows.shape, device=k.device)
    else:
        bias = call.log_count.reshape(-1)[key_rows]
    bias = bias.masked_fill(unused, -torch.inf)
    blocks = call.q.new_empty(*query_rows.shape, call.v.shape[-1])
    for part in _slices(len(key_rows), 2 * key_rows.shape[1] * k.shape[-1] * k.element_size(), k.device):
        allowed, alive = None, (bias[part] > -torch.inf).any(-1)[:, None]
        if plan.query_tags is not None and plan.key_tags is not None:
            query_tags = plan.query_tags.reshape(-1)[query_rows[part]]
            key_tags = plan.key_tags.reshape(-1)[key_rows[part]]
            allowed = share_tag(query_tags[:, :, None], key_tags[:, None, :])
            alive = (allowed & (bias[part] > -torch.inf)[:, None]).any(-1)
            allowed = allowed[:, None]
        out = _biased(
            _take(q, query_rows[part])[:, None],
            _take(k, key_rows[part])[:, None],
            _take(v, key_rows[part])[:, None],
            bias[part][:, None],
            call.scale,
            augment,
            allowed,
        )
        blocks[part] = out[:, 0].masked_fill(~alive[..., None], 0.0)
    places = blocks.shape[1] * plan.block_mask.shape[2]  # places per head, its last block padded
    back = inverse_order(plan.query_index) + _head_offsets(plan, places)
    return _take(blocks.flatten(0, 1), back)


def _gather_lists(plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to gather for every query block, N = B * H * query blocks, counted through batch and heads.

    Returns:
        query rows [N, block_q], where the last query fills up a short block; key rows [N, lanes]; and which
        lanes are unused, [N, lanes] bool. The lanes are those of the longest block list: `plan.max_blocks`,
        or counted here (one host sync).
    """
    device, (query_blocks, key_blocks) = plan.block_mask.device, plan.block_mask.shape[2:]
    places = torch.arange(query_blocks * plan.block_q, device=device).clamp(max=plan.num_queries - 1)
    query_rows = plan.query_index[..., places] + _head_offsets(plan, plan.num_queries)

    longest = plan.max_blocks if plan.max_blocks is not None else int(plan.block_mask.sum(-1).max())
    listed = torch.where(plan.block_mask, torch.arange(key_blocks, device=device), key_blocks)
    listed = listed.sort(dim=-1).values[..., : max(longest, 1)]
    places = (listed[..., None] * plan.block_k + torch.arange(plan.block_k, device=device)).flatten(2)
    unused = places >= plan.num_keys
    key_rows = plan.key_index.gather(2, places.clamp(max=plan.num_keys - 1))
    key_rows = key_rows + _head_offsets(plan, plan.num_keys)

    lanes = listed.shape[-1] * plan.block_k
    return query_rows.reshape(-1, plan.block_q), key_rows.view(-1, lanes), unused.view(-1, lanes)


def _head_offsets(plan: BlockPlan, rows_per_head: int) -> Tensor:
    batch, heads = plan.block_mask.shape[:2]
    return torch.arange(batch * heads, device=plan.block_mask.device).view(batch, heads, 1) * rows_per_head


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, D] at index [...] -> [..., D], a row copy each (`gather` would go element by element)."""
    return rows.index_select(0, index.reshape(-1)).view(*index.shape, rows.shape[-1])


def _slices(length: int, bytes_each: int, device: torch.device) -> Iterator[slice]:
    """Cut `length` items so that each part's scratch stays in bounds."""
    size = max(1, _SCRATCH_BYTES[device.type] // bytes_each)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


_DEVICES = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

SDPA = Engine(
    name="sdpa",
    run=partial(_run, augment_on=_CUDA),
    devices=_DEVICES,
    dtypes=_DTYPES,
    counts_in_keys=_CUDA,
)
AUGMENTED = replace(SDPA, name="augmented", run=partial(_run, augment_on=_DEVICES), counts_in_keys=_DEVICES)
