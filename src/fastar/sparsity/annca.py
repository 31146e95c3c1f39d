"""AnnCA: prompt tokens that no latent query shares a bucket with are dropped (paper section 1, "AnnCA")."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext
from fastar.sparsity.annsa import bucketize
from fastar.sparsity.base import ChunkMemo, CrossSelector, Rebuild, ScheduleOptions, check_choice
from fastar.sparsity.merge import compact, merge_identical

__all__ = ["AnnCA", "compact", "merge_identical"]


class AnnCA(CrossSelector):
    """Keeps a prompt token iff at least one latent query of the pass falls into its bucket. Not top-k.

    A head that keeps nothing attends to nothing: its output is zero.

    Args:
        bucketizer: puts latent queries and prompt keys into one bucket space.
        shared_heads: one decision for all heads, from their concatenated vectors, instead of one per head.
        rebuild: decide in every pass, or once a chunk (at its first sparse pass) and reuse the decision.
        layers, warmup_share, min_dense_steps, commit_dense: see `Scheduled`.
    """

    def __init__(
        self,
        *,
        bucketizer: Bucketizer,
        shared_heads: bool = False,
        rebuild: Rebuild = "pass",
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(**schedule)
        check_choice("rebuild", rebuild, ("pass", "chunk"))
        self.bucketizer, self.shared_heads, self.rebuild = bucketizer, shared_heads, rebuild
        self._memo: ChunkMemo[Tensor] = ChunkMemo()

    def select(self, layer: int, context: PassContext, q: Tensor, k: Tensor) -> Tensor | None:
        """Which prompt tokens to keep, for latent queries q [B, H, Lq, D] and prompt keys k [B, H, S, D].

        Returns:
            [B, H, S] bool, or None for all of them (dense passes and layers). `compact` applies it.
        """
        if self.is_dense(layer, context):
            return None
        sizes = (q.shape[2], k.shape[2])
        keep = self._memo.get(layer, context, *sizes) if self.rebuild == "chunk" else None
        if keep is None:
            query_tags, key_tags = self.tags(q, k)
            keep = occurs_in(key_tags, query_tags)
            if self.rebuild == "chunk":
                self._memo.put(layer, context, *sizes, built=keep)
        return keep

    def tags(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt-induced buckets of latent queries and prompt keys, int64 [B, H, Lq] and [B, H, S].

        The queries' are what AnnSA takes as `text_tags` with `source=prompt`. Every pass has them, dense ones
        too.
        """
        return bucketize(self.bucketizer, q, k, shared_heads=self.shared_heads)


def occurs_in(ids: Tensor, among: Tensor) -> Tensor:
    """Whether each of ids [..., n] is one of among [..., m] of the same row: [..., n] bool."""
    ordered = among.sort(dim=-1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, place) == ids
