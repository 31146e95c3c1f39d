"""What a selector of self-attention is asked, of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.rope import RotaryEmbedding
from fastar.attention.working import WorkingKeys
from fastar.sparsity import SelectRequest


def request_of(
    layer: int,
    context: PassContext,
    q: Tensor,
    q_raw: Tensor,
    k_raw: Tensor,
    working: WorkingKeys,
    *,
    rope: RotaryEmbedding | None,
    tags: tuple[Tensor | None, Tensor | None],
) -> SelectRequest:
    """The pairs of queries q [B, H, Lq, D] and working keys.

    Args:
        q_raw, k_raw: the queries and the current keys before RoPE.
        rope: takes the cached keys back to where they were before it; None: the selector does not ask for them.
        tags: of the queries and of all keys, or None.
    """
    raw = None
    if rope is not None:
        raw = k_raw
        if working.cached and working.positions is not None:
            past = rope.unrotate(working.own_keys[:, :, : working.cached], working.positions)
            raw = torch.cat([past, k_raw], dim=2)
    return SelectRequest(
        layer=layer,
        context=context,
        q=q,
        k=working.own_keys,
        q_raw=q_raw,
        k_raw=raw,
        log_count=working.log_count,
        num_current=k_raw.shape[2],
        text_tags=tags[0],
        key_tags=tags[1],
    )
