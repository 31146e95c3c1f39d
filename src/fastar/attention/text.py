"""The text stream of a rollout: a prompt's keys as they are attended to, and what a selector keeps of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.sparsity.base import CrossSelector, PromptKeys
from fastar.sparsity.merge import compact, first_to_front, identical, merge_identical


@dataclass(frozen=True)
class Selection:
    """What a call of cross-attention was given and what it read.

    Attributes:
        prompt: the layer's keys before the selector.
        keep: [B, H, S] bool over them, padding included; None if all were read.
    """

    prompt: PromptKeys
    keep: Tensor | None


@dataclass
class _Entry:
    given: Tensor  # the keys that it was made of
    prompt: PromptKeys
    v: Tensor
    width: int | None = None  # tokens to keep room for, once it is known that it stays


class TextStream:
    """Cross-attention's side of an `AttentionState`.

    What depends on the prompt alone (which tokens are padding, merged padding) is found once a prompt and layer: as
    long as the backbone passes the same tensor of keys, it is remembered.

    Args:
        selector: which prompt tokens are kept.
    """

    def __init__(self, selector: CrossSelector) -> None:
        self.selector = selector
        self._entries: dict[int, _Entry] = {}

    def prepare(
        self, layer: int, context: PassContext, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Selection]:
        """What queries q [B, H, Lq, D] read of k and v [B, H, S, D]: keys, values, log-counts, and their choice."""
        entry = self._entries.get(layer)
        if entry is None or entry.given is not k:
            entry = self._entries[layer] = _enter(k, v, merged=self.selector.padding == "merged")
        prompt = entry.prompt
        self.selector.observe(layer, context, q, prompt)
        dense = self.selector.is_dense(layer, context)
        keep = None if dense else self.selector.select(layer, context, q, prompt)
        if keep is not None:
            keep = keep | ~prompt.real
            if prompt.log_count is not None:
                keep = keep & (prompt.log_count > -torch.inf)
        short_k, short_v, log_count = compact(prompt.k, entry.v, keep, prompt.log_count, width=entry.width)
        if keep is not None and self.selector.keeps_as_many:
            entry.width = short_k.shape[2]  # counting makes the host wait
        return short_k, short_v, log_count, Selection(prompt, keep)


def _enter(k: Tensor, v: Tensor, *, merged: bool) -> _Entry:
    same, members = identical(k, v)
    if not merged:
        return _Entry(k, PromptKeys(k, members.gather(-1, same) == 1), v)
    short_k, short_v, log_count = merge_identical(k, v)
    tokens = first_to_front(same == torch.arange(k.shape[2], device=k.device))[..., : short_k.shape[2]]
    return _Entry(k, PromptKeys(short_k, log_count == 0, log_count, tokens), short_v)
