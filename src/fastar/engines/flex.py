"""FlexAttention: a compiled kernel that skips blocks by a BlockMask built from the plan on the device.

Runs compiled on CUDA (Triton) and on CPU (C++; forward only, needs a compiler). The first call of a dtype
compiles for several seconds; shapes are dynamic, so a growing cache does not compile again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastar.engines.plan import BlockPlan, inverse_order, share_tag, take_rows
from fastar.engines.registry import AttentionCall, Engine

_SMALLEST_TILE = 16  # rows or columns of a tensor-core product
_LARGEST_TILE = 64
_VARIANTS = 64  # that one process may compile: dtypes, head widths, block sizes, with or without counts


@cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: fail rather than run unfused
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(plan: BlockPlan) -> BlockMask:
    """The plan as FlexAttention's BlockMask, in plan order; built on the device without a host sync."""
    mask_mod = None
    if plan.query_tags is not None and plan.key_tags is not None:
        query_tags = plan.query_tags.gather(2, plan.query_index)
        key_tags = plan.key_tags.gather(2, plan.key_index)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return share_tag(query_tags[b, h, i], key_tags[b, h, j])

    return BlockMask.from_kv_blocks(
        *plan.listed(),
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=mask_mod,
        seq_lengths=(plan.num_queries, plan.num_keys),
        compute_q_blocks=False,
    )


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    q, k, v, log_count, plan = call.q, call.k, call.v, call.log_count, call.plan
    arguments: dict[str, Any] = {"scale": call.scale}
    if q.is_cuda:
        arguments["kernel_options"] = {"BACKEND": "TRITON"}
    if plan is not None:
        q = take_rows(q, plan.query_order)
        k, v = take_rows(k, plan.key_order), take_rows(v, plan.key_order)
        if log_count is not None and plan.key_order is not None:
            log_count = log_count.gather(2, plan.key_order)
        arguments["block_mask"] = block_mask(plan)
        if q.is_cuda:
            arguments["kernel_options"] |= {"BLOCK_M": _tile(plan.block_q), "BLOCK_N": _tile(plan.block_k)}
    if log_count is not None:
        bias = log_count.contiguous()

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[b, h, j]

        arguments["score_mod"] = score_mod
    lse = None
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
        if call.return_lse:
            out, aux = _compiled()(q, k, v, return_aux=AuxRequest(lse=True), **arguments)
            lse = aux.lse
        else:
            out = _compiled()(q, k, v, **arguments)
    if plan is not None and plan.query_order is not None:
        back = inverse_order(plan.query_order)
        out, lse = take_rows(out, back), None if lse is None else lse.gather(2, back)
    return out, lse


def _tile(block: int) -> int:
    """Largest power of two that divides a plan's block and is a sensible tile."""
    return min(block & -block, _LARGEST_TILE)


def _limits(call: AttentionCall) -> str | None:
    """Constraints of the compiled kernels beyond device and dtype."""
    if not call.q.is_cuda:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            return "it has no backward pass on cpu"
        if call.plan is not None and call.plan.query_tags is not None:
            return "torch's C++ code generator cannot compile a mask by query tag (CUDA can)"
        return None
    if min(call.q.shape[-1], call.v.shape[-1]) < _SMALLEST_TILE:
        return f"its CUDA kernel needs heads of at least {_SMALLEST_TILE}"
    if call.plan is not None and min(_tile(call.plan.block_q), _tile(call.plan.block_k)) < _SMALLEST_TILE:
        return f"its CUDA kernel needs plan blocks that are multiples of {_SMALLEST_TILE}"
    return None


@cache
def _missing(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if find_spec("triton") else "the triton package is not installed"
    return None if shutil.which("c++") or shutil.which("g++") else "it needs a C++ compiler on cpu"


FLEX = Engine(
    name="flex",
    run=_run,
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    lse_devices=frozenset({"cuda"}),
    missing=_missing,
    limits=_limits,
)
