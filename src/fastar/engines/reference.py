"""The definition of attention here: plain PyTorch, float32 (float64 for float64 inputs), whole score
matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.engines.plan import BlockPlan
from fastar.engines.registry import AttentionCall, Engine


def attention_logits(
    q: Tensor,
    k: Tensor,
    *,
    log_count: Tensor | None = None,
    plan: BlockPlan | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """scale q k^T + log_count, -inf where the plan skips a pair: [B, H, Lq, Lk] float32 or float64.

    scale: 1 / sqrt(D) if None. lengths: [B, H], keys that each head has; -inf from there on, whatever lies there.
    """
    precision = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q.to(precision) @ k.to(precision).transpose(-1, -2) * scale
    if log_count is not None:
        logits = logits + log_count[..., None, :].to(precision)
    if plan is not None:
        logits = logits.masked_fill(~plan.token_mask(), -torch.inf)
    if lengths is not None:
        logits = logits.masked_fill(behind(lengths, k.shape[2])[..., None, :], -torch.inf)
    return logits


def behind(lengths: Tensor, keys: int) -> Tensor:
    """Whether a key lies behind its head's length [B, H]: [B, H, keys] bool."""
    return torch.arange(keys, device=lengths.device) >= lengths[..., None]


def attention_weights(
    q: Tensor, k: Tensor, *, log_count: Tensor | None = None, plan: BlockPlan | None = None
) -> Tensor:
    """Softmax weights of every pair, [B, H, Lq, Lk]; rows sum to 1, or to 0 where nothing can be attended.

    Args:
        q: [B, H, Lq, D]. k: [B, H, Lk, D].
        log_count: broadcastable to [B, H, Lk]; a merged slot's weight is that of all its members together.
        plan: pairs to execute; None means all.
    """
    logits = attention_logits(q, k, log_count=log_count, plan=plan)
    # softmax of a row of -inf is nan; such a query attends to nothing
    return torch.softmax(logits, dim=-1).masked_fill(_nothing_to_attend(logits), 0.0)


def _nothing_to_attend(logits: Tensor) -> Tensor:
    return (logits == -torch.inf).all(dim=-1, keepdim=True)


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    logits = attention_logits(
        call.q, call.k, log_count=call.log_count, plan=call.plan, scale=call.scale, lengths=call.lengths
    )
    weights, v = torch.softmax(logits, dim=-1).masked_fill(_nothing_to_attend(logits), 0.0), call.v
    if call.lengths is not None:  # 0 times what is not finite would be nan
        v = v.masked_fill(behind(call.lengths, v.shape[2])[..., None], 0.0)
    out = (weights @ v.to(weights.dtype)).to(call.q.dtype)
    return out, torch.logsumexp(logits, dim=-1).float() if call.return_lse else None


REFERENCE = Engine(name="reference", run=_run, lse_devices=None, takes_lengths=True)
