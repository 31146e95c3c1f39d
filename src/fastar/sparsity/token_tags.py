"""Prompt buckets by the token that a latent token looks at most: dense cross-attention, tagged for AnnSA."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.engines.reference import attention_logits
from fastar.sparsity.base import PromptKeys
from fastar.sparsity.dense import DenseCross, Padding


class TokenTags(DenseCross):
    """Dense cross-attention that tags a latent token with the prompt token it attends to most, padding left out.

    Args:
        tag_layer: the layer whose attention says so for all layers; None: each layer for itself.
        shared_heads: one tag for all heads, by their summed attention.
        padding: see `CrossSelector`.
    """

    tags_tokens = True

    def __init__(
        self, *, tag_layer: int | None = None, shared_heads: bool = True, padding: Padding = "attended"
    ) -> None:
        super().__init__(padding=padding)
        self.tag_layer, self.shared_heads = tag_layer, shared_heads

    def tag(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        logits = attention_logits(q, prompt.k).masked_fill(~prompt.real[:, :, None], -torch.inf)
        if self.shared_heads:
            # a prompt of padding alone has no tokens
            logits = logits.softmax(-1).nan_to_num().sum(1, keepdim=True).expand(logits.shape)
        slots = logits.argmax(-1)
        # tokens, not slots: in protocol A a teacher that merges nothing tags what its students have cached
        return slots if prompt.tokens is None else prompt.tokens.gather(2, slots)
