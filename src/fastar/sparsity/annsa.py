"""AnnSA: self-attention between queries and keys of the same content bucket (paper section 1, "AnnSA").

Queries and keys are bucketed by approximate nearest-neighbour codes, put in bucket order and cut into blocks;
a block pair is worth executing if it holds same-bucket pairs. The paper attends to same-bucket keys and no
others (`density: null`); a density target instead spends an exact budget of blocks, best first.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext
from fastar.engines.plan import BlockPlan
from fastar.sparsity.base import (
    ChunkMemo,
    MatchSpace,
    ScheduleOptions,
    Selector,
    SelectRequest,
    check_choice,
)
from fastar.sparsity.blocks import (
    DensityOf,
    build_plan,
    centroid_scores,
    check_block_sizes,
    check_density,
    choose_blocks,
    lay_out_keys,
    shared_pairs,
    sort_by_bucket,
)

Source = Literal["content", "prompt"]
Rank = Literal["shared", "centroid"]


class AnnSA(Selector):
    """Bucketed block-sparse self-attention. The current chunk is always attended to.

    Args:
        bucketizer: assigns the buckets; required when `source` is content.
        density: executed / dense pairs to aim for; 1 is dense. None is the letter of the paper: exactly the pairs
            that share a bucket, whatever number of blocks that takes.
        density_of: what it is a share of, `all` pairs, the current chunk's counted, or those with the `past` alone. Of
            a small cache the chunk is a large part: 3 of the 9 frames that a budget of 6 reads, nearly all of 35 %.
        source: `content` buckets queries and keys themselves; `prompt` takes the tags that cross-attention
            left on them (`SelectRequest.text_tags` and `key_tags`, the paper's prompt-induced buckets).
        match_space: bucket vectors after RoPE (what attention compares) or before it (raw: content alone).
        shared_heads: one bucket for all heads, from their concatenated vectors, instead of one per head.
        rank: what makes a block worth its budget: `shared` counts same-bucket pairs and breaks ties by the
            logit between block centroids; `centroid` uses that logit alone.
        block_q, block_k: tokens per block. The defaults suit a few hundred queries a chunk (the Doom model
            has 192 queries against 9,216 cached keys); at 128 a block of so few queries reads nearly every
            bucket and nothing is sparse. For thousands of queries on a GPU use 64 or 128.
        rebuild: plan once a `chunk`, at its first sparse pass, and reuse the plan, in passes up to the `commit`, too
            (if commits are sparse; by a plan of their own otherwise); or anew in every `pass`.
        layers, warmup_share, min_dense_steps, commit_dense: see `Scheduled`.
    """

    def __init__(
        self,
        *,
        bucketizer: Bucketizer | None = None,
        density: float | None = 0.25,
        density_of: DensityOf = "all",
        source: Source = "content",
        match_space: MatchSpace = "roped",
        shared_heads: bool = False,
        rank: Rank = "shared",
        block_q: int = 16,
        block_k: int = 32,
        rebuild: Literal["pass", "chunk", "commit"] = "chunk",
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(**schedule)
        check_density(density, density_of)
        check_block_sizes(block_q, block_k)
        check_choice("source", source, ("content", "prompt"))
        check_choice("match_space", match_space, ("roped", "raw"))
        check_choice("rank", rank, ("shared", "centroid"))
        check_choice("rebuild", rebuild, ("pass", "chunk", "commit"))
        if source == "content" and bucketizer is None:
            raise ValueError(
                "AnnSA with content buckets needs a bucketizer: choose lsh, quantized, kmeans or random"
            )
        self.bucketizer, self.density, self.density_of, self.source = bucketizer, density, density_of, source
        self.match_space, self.shared_heads, self.rank = match_space, shared_heads, rank
        self.wants_tags = source == "prompt"
        self.block_q, self.block_k, self.rebuild = block_q, block_k, rebuild
        self.blocks, self.tags_in_blocks = None if density == 1 else (block_q, block_k), density is None
        self.keeps_plans = rebuild != "pass"
        self._memo: ChunkMemo[BlockPlan] = ChunkMemo()

    def forget(self, next_frame: int) -> None:
        self._memo.clear()

    def standing(self, layer: int, context: PassContext, num_queries: int, num_keys: int) -> BlockPlan | None:
        """The chunk's plan, if an earlier pass made it and this one is sparse."""
        if not self.keeps_plans or self.is_dense(layer, context):
            return None
        sizes = (num_queries, num_keys)
        if context.commits and self.rebuild == "commit":
            return self._memo.denoised(layer, context, *sizes)
        return self._memo.get(layer, context, *sizes)

    def select(self, request: SelectRequest) -> BlockPlan | None:
        """The block plan of a call that the schedule makes sparse; None if the density target is 1.

        With `source=prompt` also where there are no tags yet: the first pass of a chunk supplies them.
        """
        if self.density == 1 or (self.source == "prompt" and request.text_tags is None):
            return None
        sizes = (request.q.shape[2], request.k.shape[2])
        plan = self.standing(request.layer, request.context, *sizes)
        if plan is None:
            plan = self._build(request)
            if self.keeps_plans:
                self._memo.put(request.layer, request.context, *sizes, built=plan)
        return plan

    def _build(self, request: SelectRequest) -> BlockPlan:
        assign = self._tags if self.source == "prompt" else self._buckets
        query_buckets, key_buckets = assign(request)
        query_runs, query_order = sort_by_bucket(query_buckets)
        layout = lay_out_keys(key_buckets, request.log_count, request.num_current)
        wildcards = self.source == "prompt"
        shared = shared_pairs(query_runs, layout, self.block_q, self.block_k, wildcards=wildcards)
        if self.density is None:
            starts = torch.arange(shared.shape[-1], device=shared.device) * self.block_k
            mask = (shared > 0) | (starts < layout.current)
            tags = (query_buckets, key_buckets)
            pairs = (shared * mask).sum((2, 3))
            return build_plan(
                query_order, layout, mask, self.block_q, self.block_k, tags=tags, bucket_pairs=pairs
            )
        scores = centroid_scores(request, query_order, layout, self.block_q, self.block_k)
        if self.rank == "shared":
            # counts are whole numbers: the logit only breaks their ties
            scores = shared + scores.sigmoid() * 0.5
        chosen = choose_blocks(scores, layout, self.block_k, self.density, self.density_of)
        pairs = (shared * chosen.mask).sum((2, 3))
        return build_plan(
            query_order, layout, chosen.mask, self.block_q, self.block_k,
            max_blocks=chosen.most, bucket_pairs=pairs, lists=chosen.lists,
        )  # fmt: skip

    def _buckets(self, request: SelectRequest) -> tuple[Tensor, Tensor]:
        assert self.bucketizer is not None
        q, k = request.q, request.k
        if self.match_space == "raw":
            if request.q_raw is None or request.k_raw is None:
                raise ValueError("AnnSA with match_space=raw needs q_raw and k_raw in its request")
            q, k = request.q_raw, request.k_raw
        live = None if request.log_count is None else request.log_count.expand(k.shape[:3]) > -torch.inf
        return bucketize(self.bucketizer, q, k, live, shared_heads=self.shared_heads)

    def _tags(self, request: SelectRequest) -> tuple[Tensor, Tensor]:
        if request.text_tags is None or request.key_tags is None:
            raise ValueError("AnnSA with source=prompt needs text_tags and key_tags together")
        return request.text_tags.contiguous(), request.key_tags


def bucketize(
    bucketizer: Bucketizer, q: Tensor, k: Tensor, valid: Tensor | None = None, *, shared_heads: bool
) -> tuple[Tensor, Tensor]:
    """Buckets of q [B, H, Lq, D] and k [B, H, Lk, D] as int64 [B, H, Lq] and [B, H, Lk].

    Keys that are not `valid` [B, H, Lk] change no other bucket. With `shared_heads` the heads' vectors are concatenated
    and all heads get the same buckets; a key counts if it is valid in all.
    """
    batch, heads = q.shape[:2]
    if shared_heads:
        everywhere = None if valid is None else valid.all(1)
        sides = (x.transpose(1, 2).flatten(2) for x in (q, k))
        buckets = bucketizer.buckets(*sides, valid=everywhere)
        queries, keys = (ids[:, None].expand(batch, heads, -1).contiguous() for ids in buckets)
        return queries, keys
    each = None if valid is None else valid.flatten(0, 1)
    queries, keys = bucketizer.buckets(q.flatten(0, 1), k.flatten(0, 1), valid=each)
    return queries.unflatten(0, (batch, heads)), keys.unflatten(0, (batch, heads))
