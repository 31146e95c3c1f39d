"""FlashAttention-4 on Hopper (flash_attn.cute): dense, log-counted, block-sparse, and these together.

Log-counts go through the augmented head, 144 coordinates for heads of 128; values keep their width. A block plan is
handed over as lists on the device, so that nothing waits for the host and a call can be captured in a CUDA graph once
one like it has compiled (2 to 3 s for each class of widths, block sizes and options; lengths are free).

Calls of one sequence whose last wave of query tiles would leave processors idle are split over the keys there
(`fastar.engines.waves`), block plans of a known length over their lists.

Tensors go in as they lie, [B, H, L, D] seen as [B, L, H, D]: any strides that are multiples of 16 bytes do, the last
one being 1. Slices of a larger buffer of slots are thus read in place. Only what a plan orders is copied.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.engines.plan import BlockPlan
from fastar.engines.registry import AttentionCall, Engine
from fastar.engines.rows import gathered, scattered
from fastar.engines.unbiased import augmented, live_queries, silence, unfit_for_hopper_kernels, unfit_widths
from fastar.engines.waves import boundaries, join, split_of

if TYPE_CHECKING:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

_KEY_MULTIPLE = 16  # columns of a tensor-core step: anything else is padded to it inside the kernel
_BLOCK_Q = 64  # rows of one warp group: query tiles are multiples
_BLOCK_K, _LARGEST_BLOCK_K = 16, 128
_NARROW = 96  # numbers of a head, up to which a processor's tile has the second of these numbers of queries
_TILE, _NARROW_TILE = 128, 192


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    live = live_queries(call)
    call = augmented(call, FA4)
    if call.plan is not None:
        return _sparse(call, call.plan, live)
    out, lse = _dense(call) if call.lengths is None else _ragged(call, call.lengths)
    return silence(out, lse, live)


def _dense(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    keys, split = k.shape[1], _split_of(call, k.shape[1], listed=False)
    if split is None:
        out, lse = flash_attn_func(q, k, v, softmax_scale=call.scale, return_lse=call.return_lse)
        return out.transpose(1, 2), lse
    whole, splits = split
    parts = flash_attn_varlen_func(
        q[:, whole:].expand(splits, -1, -1, -1), k[0], v[0], cu_seqlens_k=boundaries(keys, splits, q.device),
        max_seqlen_k=-(-keys // splits), softmax_scale=call.scale, return_lse=True,
    )  # fmt: skip
    return _joined(call, q[:, :whole], k, v, None, *parts)


def _split_of(call: AttentionCall, keys: int, *, listed: bool) -> tuple[int, int] | None:
    """How the last queries of a call are split over the keys that each reads (`fastar.engines.waves`), if they are."""
    batch, heads, queries, width = call.q.shape
    if batch > 1:
        return None  # parts of the keys are read as sequences of their own; those of two videos lie apart
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return None  # what is joined has no gradients
    tile = _NARROW_TILE if width <= _NARROW else _TILE
    return split_of(queries, keys, heads, _processors(call.q.device), tile, width, listed=listed)


def _joined(
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockSparseTensorsTorch | None,
    parts: Tensor,
    part_lse: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The call's result, its last queries' from attention over parts of what they read.

    The first ones, q [1, n, H, D], are attended here, over the blocks in `lists` or, if that is None, over all keys.
    """
    from flash_attn.cute.interface import _flash_attn_fwd  # the public one cannot write into a larger output

    heads, queries, whole = *call.q.shape[1:3], q.shape[1]
    out, lse = parts.new_empty(1, queries, heads, parts.shape[3]), part_lse.new_empty(1, heads, queries)
    if whole:
        own = _flash_attn_fwd(
            q, k, v, softmax_scale=call.scale, block_sparse_tensors=lists, return_lse=call.return_lse,
            out=out[:, :whole],
        )[1]  # fmt: skip
        if own is not None:
            lse[..., :whole] = own
    out = out.transpose(1, 2)
    join(parts, part_lse, out[0, :, whole:], lse[0, :, whole:])
    return out, lse if call.return_lse else None


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ragged(call: AttentionCall, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Heads as a batch of one-headed sequences, each of which has a length of its own."""
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v = (x.flatten(0, 1).unsqueeze(2) for x in (call.q, call.k, call.v))
    out, lse = flash_attn_varlen_func(
        q, k, v, seqused_k=lengths.flatten(), softmax_scale=call.scale, return_lse=call.return_lse
    )  # fmt: skip
    lead = call.q.shape[:2]
    return out.squeeze(2).unflatten(0, lead), None if lse is None else lse.squeeze(1).unflatten(0, lead)


def _sparse(call: AttentionCall, plan: BlockPlan, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    q = gathered(call.q, plan.query_order).transpose(1, 2)
    k, v = (gathered(x, plan.key_order).transpose(1, 2) for x in (call.k, call.v))
    out, lse = silence(*_over_lists(call, plan, q, k, v), live)
    if lse is not None and plan.query_order is not None:
        lse = torch.empty_like(lse).scatter_(2, plan.query_order, lse)
    return scattered(out, plan.query_order), lse


def _over_lists(
    call: AttentionCall, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention of q over k and v [B, L, H, D], in the plan's order: [B, H, Lq, D], and lse."""
    from flash_attn.cute import flash_attn_func

    (counts, indices), none, split = plan.listed(), plan.no_blocks, None
    if plan.block_q == _TILE and q.shape[3] > _NARROW and plan.max_blocks is not None:
        split = _split_of(call, plan.max_blocks * plan.block_k, listed=True)
    if split is None:
        out, lse = flash_attn_func(
            q, k, v, softmax_scale=call.scale, block_sparse_tensors=_lists(plan, counts, indices, none),
            return_lse=call.return_lse,
        )  # fmt: skip
        return out.transpose(1, 2), lse
    whole, splits = split
    blocks = whole // plan.block_q
    dealt = _lists(plan, *plan.dealt_out(blocks, splits), none[:, :, blocks:].expand(splits, -1, -1))
    parts = flash_attn_func(
        *(x.expand(splits, -1, -1, -1) for x in (q[:, whole:], k, v)),
        softmax_scale=call.scale, block_sparse_tensors=dealt, return_lse=True,
    )  # fmt: skip
    first = _lists(plan, *(x[:, :, :blocks] for x in (counts, indices, none)))
    return _joined(call, q[:, :whole], k, v, first, *parts)


def _lists(plan: BlockPlan, counts: Tensor, indices: Tensor, none: Tensor) -> BlockSparseTensorsTorch:
    """Blocks that are read, as the kernel takes them; `none`: zeros of the shape of `counts`.

    Those to be read whole are "full" ones. The list of masked ones is empty, but the Hopper kernel does not compile
    without it. Keys past the last are masked in the first block it reads, which is the last of an ascending list.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(plan.block_q, plan.block_k),
    )


def _limits(call: AttentionCall) -> str | None:
    reason = unfit_widths(call, FA4)
    if reason is not None or call.plan is None:
        return reason
    if call.lengths is not None:
        return "it takes a block plan or lengths, not both"
    if call.plan.query_tags is not None:
        return "it takes no block plan with tags inside the blocks"
    if call.plan.block_q % _BLOCK_Q:
        return f"its plans need a multiple of {_BLOCK_Q} queries to a block, not {call.plan.block_q}"
    if call.plan.block_k % _BLOCK_K or call.plan.block_k > _LARGEST_BLOCK_K:
        return (
            f"its plans need a multiple of {_BLOCK_K} and at most {_LARGEST_BLOCK_K} keys to a block, "
            f"not {call.plan.block_k}"
        )
    return None


@cache
def _missing(device: torch.device) -> str | None:
    try:
        found = find_spec("flash_attn.cute")
    except ModuleNotFoundError:
        found = None
    if found is None or find_spec("cutlass") is None:
        return "it needs FlashAttention-4: pip install 'flash-attn-4[cu13]'"
    if find_spec("triton") is None:
        return "it puts tokens in the order of a plan with Triton: install triton"
    return unfit_for_hopper_kernels(device)


FA4 = Engine(
    name="fa4",
    run=_run,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    lse_devices=frozenset({"cuda"}),
    takes_lengths=True,
    key_multiple=_KEY_MULTIPLE,
    counts_in_keys=frozenset({"cuda"}),
    missing=_missing,
    limits=_limits,
)
