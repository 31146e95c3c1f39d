"""How attention is executed: one function, `attend`, in front of interchangeable engines.

Every engine computes softmax(q k^T / sqrt(D) + log_count) v over the pairs that a block plan names, and is
tested against `reference`, the plain fp32 definition. Nothing falls back: an engine that cannot execute a
call says why. Slots of 8 or 4 bits that are not unpacked have a function of their own, `fastar.engines.packed`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar.engines.augmented import EXTRA
from fastar.engines.auto import FEW_KEYS, choose, example_call, for_few_keys
from fastar.engines.plan import WILDCARD, BlockPlan
from fastar.engines.registry import AttentionCall, Engine, get, names, resolve

__all__ = [
    "FEW_KEYS",
    "WILDCARD",
    "AttentionCall",
    "BlockPlan",
    "Engine",
    "EngineChoice",
    "attend",
    "choose",
    "example_call",
    "for_few_keys",
    "get",
    "key_width",
    "names",
    "resolve",
]


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """A configured engine: `name` is `auto` or one of `names()`."""

    name: str = "auto"

    def resolve(self, device: torch.device | str) -> str:
        """The engine's name on `device`; see `fastar.engines.resolve`."""
        return resolve(self.name, device)


def key_width(engine: str, head_dim: int, device: torch.device | str | None = None) -> int:
    """Width at which an engine wants keys that carry their log-counts stored, 144 to 192 for heads of 128.

    Given a `device`, `head_dim` where log-counts apart are no dearer. Keys kept at this width
    (`fastar.engines.augmented`) are attended to with `head_dim=` and without a copy.

    Args:
        engine: a name that `resolve` returned.
    """
    chosen = get(engine)
    if device is not None and torch.device(device).type not in chosen.counts_in_keys:
        return head_dim
    return chosen.key_width(head_dim)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_count: Tensor | None = None,
    plan: BlockPlan | None = None,
    lengths: Tensor | None = None,
    head_dim: int | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q over k and v, softmax scale 1/sqrt(D), or 1/sqrt(head_dim) if that is given.

    Args:
        q: [B, H, Lq, D]. k: [B, H, Lk, D]. v: [B, H, Lk, Dv]; one dtype and device.
        log_count: logarithm of the number of tokens each key stands for, broadcastable to [B, H, Lk]; added
            to its logits (paper section 3, TempCache lemma). -inf marks an empty slot, which is never
            attended.
        plan: block pairs to execute; None means all.
        lengths: [B, H] int32, how many keys each head has; those behind are not attended to. None means all. Engines
            that do not take them get log-counts of -inf.
        head_dim: the true head dim if q and k carry the log-counts in extra coordinates already
            (fastar/engines/augmented.py); log_count must then be None. Empty slots are then keys of negligible weight:
            a query that has nothing else to attend to gets their mean.
        engine: `auto` or an engine's name; resolve it once per rollout and pass the result.
        return_lse: also return the natural log-sum-exp of each query's logits.

    Returns:
        out [B, H, Lq, Dv] in q's dtype, and lse [B, H, Lq] float32 (None unless asked for). A query without
        any key to attend to gets zeros and lse -inf.

    Raises:
        ValueError: on shapes that do not fit, an unknown engine, or an engine that cannot execute the call.
    """
    log_count = _check_inputs(q, k, v, log_count, plan)
    _check_head_dim(q, log_count, head_dim)
    if lengths is not None and tuple(lengths.shape) != tuple(k.shape[:2]):
        raise ValueError(f"lengths {tuple(lengths.shape)} must be [batch, heads] = {tuple(k.shape[:2])}")
    lengths = None if lengths is None else lengths.to(torch.int32)
    call = AttentionCall(q, k, v, log_count, plan, return_lse, head_dim, lengths)
    chosen = get(resolve(engine, q.device, call))
    if lengths is not None and not chosen.takes_lengths:
        if head_dim is not None:
            raise ValueError(
                f"attention engine '{chosen.name}' takes no lengths beside keys that carry their log-counts: "
                "write log-counts of -inf into the keys behind them"
            )
        call = replace(call, log_count=_cut(log_count, lengths, k.shape[2]), lengths=None)
    reason = chosen.unfit_for(call)
    if reason is not None:
        raise ValueError(f"attention engine '{chosen.name}' cannot execute this call: {reason}")
    return chosen.run(call)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_count: Tensor | None, plan: BlockPlan | None
) -> Tensor | None:
    """Validate shapes and dtypes; returns log_count as [B, H, Lk] float32, or None."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes tensors of shape [batch, heads, tokens, head dim], got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention inputs must agree in batch, heads, keys and head dim, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention inputs must have one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if plan is not None and (plan.num_queries, plan.num_keys) != (q.shape[2], k.shape[2]):
        raise ValueError(f"a plan for {plan.num_queries} queries, {plan.num_keys} keys does not fit {shapes}")
    if log_count is None:
        return None
    try:
        return log_count.to(torch.float32).expand(k.shape[:3])
    except RuntimeError as error:
        raise ValueError(
            f"log_count {tuple(log_count.shape)} does not broadcast to "
            f"[batch, heads, keys] = {tuple(k.shape[:3])}"
        ) from error


def _check_head_dim(q: Tensor, log_count: Tensor | None, head_dim: int | None) -> None:
    if head_dim is None:
        return
    if log_count is not None:
        raise ValueError("with head_dim the keys carry their log-counts: pass one of head_dim and log_count")
    if not 0 < head_dim <= q.shape[3] - EXTRA:
        raise ValueError(
            f"heads of {q.shape[3]} numbers cannot hold head_dim={head_dim} and {EXTRA} coordinates for log-counts"
        )


def _cut(log_count: Tensor | None, lengths: Tensor, keys: int) -> Tensor:
    """Log-counts [B, H, Lk], -inf from each head's length on."""
    behind = torch.arange(keys, device=lengths.device) >= lengths[..., None]
    if log_count is None:
        log_count = torch.zeros((), device=lengths.device).expand(behind.shape)
    return log_count.masked_fill(behind, -torch.inf)
