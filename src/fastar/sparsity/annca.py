"""AnnCA: prompt tokens that no latent query shares a bucket with are dropped (paper section 1, "AnnCA")."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext
from fastar.sparsity.annsa import bucketize
from fastar.sparsity.base import (
    PADDINGS,
    ChunkMemo,
    CrossSelector,
    Padding,
    PromptKeys,
    Rebuild,
    ScheduleOptions,
    check_choice,
)
from fastar.sparsity.merge import compact, merge_identical

__all__ = ["AnnCA", "compact", "merge_identical"]


class AnnCA(CrossSelector):
    """Keeps a prompt token iff at least one latent query of the pass falls into its bucket. Not top-k.

    A head that keeps nothing attends to the padding; without any, its output is zero.

    Args:
        bucketizer: puts latent queries and prompt keys into one bucket space.
        shared_heads: one decision for all heads, from their concatenated vectors, instead of one per head.
        rebuild: decide in every pass, or once a chunk (at its first sparse pass) and reuse the decision.
        padding: see `CrossSelector`.
        layers, warmup_share, min_dense_steps, commit_dense: see `Scheduled`.
    """

    tags_tokens = True

    def __init__(
        self,
        *,
        bucketizer: Bucketizer,
        shared_heads: bool = False,
        rebuild: Rebuild = "pass",
        padding: Padding = "attended",
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(**schedule)
        check_choice("rebuild", rebuild, ("pass", "chunk"))
        check_choice("padding", padding, PADDINGS)
        self.padding = padding
        self.bucketizer, self.shared_heads, self.rebuild = bucketizer, shared_heads, rebuild
        self._memo: ChunkMemo[Tensor] = ChunkMemo()

    def forget(self, next_frame: int) -> None:
        self._memo.clear()

    def select(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor | None:
        """Which prompt tokens to keep: [B, H, S] bool, or None for all of them (dense passes and layers)."""
        if self.is_dense(layer, context):
            return None
        sizes = (q.shape[2], prompt.k.shape[2])
        keep = self._memo.get(layer, context, *sizes) if self.rebuild == "chunk" else None
        if keep is None:
            query_tags, key_tags = self.tags(q, prompt)
            keep = occurs_in(key_tags, query_tags)
            if self.rebuild == "chunk":
                self._memo.put(layer, context, *sizes, built=keep)
        return keep

    def tags(self, q: Tensor, prompt: PromptKeys) -> tuple[Tensor, Tensor]:
        """Prompt-induced buckets of latent queries and prompt keys, int64 [B, H, Lq] and [B, H, S].

        Padding takes no part: buckets may depend on means or quantiles of the keys.
        """
        return bucketize(self.bucketizer, q, prompt.k, prompt.real, shared_heads=self.shared_heads)

    def tag(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        return self.tags(q, prompt)[0]


def occurs_in(ids: Tensor, among: Tensor) -> Tensor:
    """Whether each of ids [..., n] is one of among [..., m] of the same row: [..., n] bool."""
    ordered = among.sort(dim=-1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, place) == ids
