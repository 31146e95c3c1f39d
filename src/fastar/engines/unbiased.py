"""What engines share whose kernels know neither biases nor empty slots: log-counts go in through an augmented head, and
queries that have nothing to attend to are mended afterwards."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.registry import AttentionCall, Engine, capability

_ALIGNED, _WIDEST = 8, 256  # numbers in 16 bytes, and in the widest head that any of these kernels takes


def augmented(call: AttentionCall, engine: Engine) -> AttentionCall:
    """The same call with its log-counts in the keys, at the engine's width."""
    if call.log_count is None:
        return call
    head_dim = call.q.shape[-1]
    width = engine.key_width(head_dim)
    q, k = augment_queries(call.q, width), augment_keys(call.k, call.log_count, width)
    return replace(call, q=q, k=k, log_count=None, head_dim=head_dim)


def widths(call: AttentionCall, engine: Engine) -> tuple[int, int]:
    """Widths of the keys and values that the kernel will see."""
    width = call.q.shape[-1]
    return width if call.log_count is None else engine.key_width(width), call.v.shape[-1]


def unfit_widths(call: AttentionCall, engine: Engine) -> str | None:
    """Why the kernel cannot take heads of that width, or None."""
    both = widths(call, engine)
    if any(width % _ALIGNED for width in both) or max(both) > _WIDEST:
        return f"it takes heads of a multiple of {_ALIGNED} and at most {_WIDEST} numbers, not {both[0]} and {both[1]}"
    return None


def unfit_for_hopper_kernels(device: torch.device) -> str | None:
    """Why kernels written for compute capability 9.0 do not run on a CUDA device, or None."""
    found = capability(device)
    if found is not None and found[0] == 9:
        return None
    return f"it is written for compute capability 9.0 (Hopper), not for {name_of(found)}"


def name_of(found: tuple[int, int] | None) -> str:
    """A compute capability in words."""
    return "a machine without a GPU" if found is None else f"{found[0]}.{found[1]}"


def live_queries(call: AttentionCall) -> Tensor | None:
    """[B, H, Lq or 1] bool, in plan order, whether a query has anything but empty slots to attend to; None: all have.

    A kernel that reads an augmented head takes empty slots for keys of negligible weight, which is right as long as
    there are others.
    """
    if call.log_count is None:
        return None
    live, plan = call.log_count > -torch.inf, call.plan
    if plan is None:
        if call.lengths is not None:
            live = live & (torch.arange(live.shape[2], device=live.device) < call.lengths[..., None])
        return live.any(-1, keepdim=True)
    if plan.key_order is not None:
        live = live.gather(2, plan.key_order)
    missing = plan.block_mask.shape[3] * plan.block_k - plan.num_keys
    blocks = pad(live, (0, missing)).unflatten(2, (-1, plan.block_k)).any(-1)
    reads = (plan.block_mask & blocks[:, :, None]).any(-1)
    return reads.repeat_interleave(plan.block_q, dim=2)[..., : plan.num_queries]


def silence(out: Tensor, lse: Tensor | None, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Zeros and -inf, in place, for queries that have nothing to attend to."""
    if live is None:
        return out, lse
    out.masked_fill_(~live[..., None], 0.0)
    return out, None if lse is None else lse.masked_fill_(~live, -torch.inf)
