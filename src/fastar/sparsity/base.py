"""What a selector is: it says which query-key pairs of an attention call are computed, and when."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.engines.plan import BlockPlan

MatchSpace = Literal["roped", "raw"]
Rebuild = Literal["pass", "chunk"]
Padding = Literal["attended", "merged"]
PADDINGS: tuple[Padding, ...] = ("attended", "merged")
Built = TypeVar("Built")


@dataclass(frozen=True)
class PromptKeys:
    """One layer's keys of the prompt, as they can be attended to.

    Attributes:
        k: [B, H, S, D].
        real: [B, H, S] bool: tokens that equal no other; the rest is padding, or an empty slot.
        log_count: [B, H, S] float32: log of the number of tokens that a slot stands for, -inf for an empty slot; or
            None if each stands for one.
        tokens: int64 [B, H, S], the first token of the prompt that a slot stands for; None if slot i is token i.
    """

    k: Tensor
    real: Tensor
    log_count: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(kw_only=True)
class SelectRequest:
    """What a selector sees of one self-attention call.

    Attributes:
        layer, context: where and in which pass.
        q: [B, H, Lq, D] and k: [B, H, Lk, D], roped; the last `num_current` keys are the current chunk's.
        num_current: keys of the current chunk.
        q_raw, k_raw: the same before RoPE, or None where no selector asked for them.
        log_count: [B, H, Lk], -inf for an empty slot, or None; the current chunk has no empty slots.
        text_tags: [B, H, Lq] int64 prompt bucket of each query, or None.
        key_tags: [B, H, Lk] int64 prompt bucket of each key, -1 where none is known (read by every query), or
            None.
    """

    layer: int
    context: PassContext
    q: Tensor
    k: Tensor
    num_current: int
    q_raw: Tensor | None = None
    k_raw: Tensor | None = None
    log_count: Tensor | None = None
    text_tags: Tensor | None = None
    key_tags: Tensor | None = None


class ScheduleOptions(TypedDict, total=False):
    """Arguments of `Scheduled`."""

    layers: Sequence[int] | None
    warmup_share: float
    min_dense_steps: int
    commit_dense: bool


class Scheduled:
    """Decides in which layers and passes a sparse method is on (paper section 1, "Schedule").

    Args:
        layers: layers the method is on in; None: all. `calibrate_layers` chooses them by measured recall.
        warmup_share: a denoising step is dense while less than this share of the steps is done.
        min_dense_steps: at least so many first steps are dense, however few steps there are.
        commit_dense: passes that write the cache (commit, prefill, rewrite) are dense: errors there last.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int] | None = None,
        warmup_share: float = 0.3,
        min_dense_steps: int = 1,
        commit_dense: bool = True,
    ) -> None:
        if not 0.0 <= warmup_share <= 1.0:
            raise ValueError(f"warmup_share is a share of the denoising steps in 0..1, got {warmup_share}")
        self.layers = None if layers is None else frozenset(layers)
        self.warmup_share, self.min_dense_steps = warmup_share, min_dense_steps
        self.commit_dense = commit_dense

    def is_dense(self, layer: int, context: PassContext) -> bool:
        """Whether this layer computes all pairs in this pass."""
        if self.layers is not None and layer not in self.layers:
            return True
        if context.kind != PassKind.DENOISE:
            return self.commit_dense
        return context.share_done < self.warmup_share or context.step < self.min_dense_steps

    def forget(self, next_frame: int) -> None:
        """Frames before `next_frame` are committed, and the cache is another: so much of what is remembered is over."""

    def in_flight(self) -> dict[int, Any]:
        """What later passes of chunks in flight go by and cannot find anew, by first frame: tensors and numbers."""
        return {}

    def restore_in_flight(self, saved: dict[int, Any], device: torch.device) -> None:
        """Remember what `in_flight` returned, and nothing else."""


class Selector(Scheduled, ABC):
    """Chooses the executed pairs of self-attention. One instance serves one rollout.

    Attributes:
        match_space: whether `plan` wants roped vectors only, or also `q_raw` and `k_raw`.
        wants_tags: whether it wants `text_tags` and `key_tags`.
        blocks: (block_q, block_k) of its plans; None if it makes none.
        tags_in_blocks: whether its plans have tags inside the blocks.
        keeps_plans: whether later passes of a chunk go by the plan of an earlier one: the very object, whose order of
            keys begins with the current chunk's.
        draws: whether its plans are drawn on the host, which no captured pass does again.
    """

    match_space: MatchSpace = "roped"
    wants_tags = False
    blocks: tuple[int, int] | None = None
    tags_in_blocks = False
    keeps_plans = False
    draws = False

    def standing(self, layer: int, context: PassContext, num_queries: int, num_keys: int) -> BlockPlan | None:
        """The plan that a call of these sizes goes by whatever its vectors are; None: ask `plan`."""
        return None

    def plan(self, request: SelectRequest) -> BlockPlan | None:
        """The block plan of one attention call; None means dense."""
        return None if self.is_dense(request.layer, request.context) else self.select(request)

    @abstractmethod
    def select(self, request: SelectRequest) -> BlockPlan | None:
        """The block plan of a call that the schedule makes sparse."""


class CrossSelector(Scheduled, ABC):
    """Chooses the prompt tokens that cross-attention reads. One instance serves one rollout.

    Attributes:
        padding: `attended`: the equal tokens that pad a prompt are read as Wan reads them, all of them, whatever is
            chosen among the others; `merged`: they are one token whose logit bias is the log of their number, which
            changes nothing but the work (`merge_identical`).
        tags_tokens: whether `tag` gives prompt buckets to latent tokens.
        tag_layer: the layer whose tags serve all layers; None: each layer has its own.
        score_layers: the layers that decide for all; None: all, or each for itself.
        keeps_as_many: whether every choice from a prompt keeps the same number of tokens.
    """

    padding: Padding = "attended"
    tags_tokens = False
    tag_layer: int | None = None
    score_layers: frozenset[int] | None = None
    keeps_as_many = False

    def observe(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> None:
        """Sees every call of cross-attention, dense ones too, before `select` is asked. q [B, H, Lq, D]."""

    @abstractmethod
    def select(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor | None:
        """Which prompt tokens to keep, [B, H, S] bool, for queries q [B, H, Lq, D]; None keeps all.

        The answer counts for real tokens only; padding is always read.
        """

    def tag(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        """Prompt buckets of latent queries q [B, H, Lq, D]: int64 [B, H, Lq], at least 0."""
        raise NotImplementedError(f"{type(self).__name__} gives no prompt buckets")


class ChunkMemo(Generic[Built]):
    """Remembers, per layer and chunk in flight, what was built for it, for reuse in its later steps until a commit."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], tuple[tuple[PassKind | int, ...], int, Built]] = {}

    def get(self, layer: int, context: PassContext, *sizes: int) -> Built | None:
        """What an earlier step of this chunk stored for this layer and sizes, or None."""
        entry = self._entries.get((layer, context.first_frame))
        if entry is None or entry[0] != (context.kind, *sizes) or context.step <= entry[1]:
            return None  # the same step again means that the chunk was started over
        return entry[2]

    def denoised(self, layer: int, context: PassContext, *sizes: int) -> Built | None:
        """What a denoising step of this chunk stored, for a pass that commits it, or None."""
        entry = self._entries.get((layer, context.first_frame))
        return entry[2] if entry is not None and entry[0] == (PassKind.DENOISE, *sizes) else None

    def put(self, layer: int, context: PassContext, *sizes: int, built: Built) -> None:
        """Replace the entry of layer and chunk."""
        self._entries[layer, context.first_frame] = ((context.kind, *sizes), context.step, built)

    def clear(self) -> None:
        """Forget everything: the cache is another."""
        self._entries.clear()


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got '{value}'")


def calibrate_layers(recalls: Mapping[int, float] | Sequence[float], *, share: float = 0.7) -> list[int]:
    """Layers that lose least when sparse: the `share` of them with the highest recall at the target density.

    The paper keeps its method to the roughly 70 % of blocks that "empirically exhibit sparsity" (section 1)
    without saying how they are found; here it is measured.

    Args:
        recalls: attention mass kept per layer when only that layer is sparse, by layer or in layer order.
        share: share of layers to turn on, rounded to the nearest whole number.

    Returns:
        Layer indices, ascending. Ties go to the lower layer.
    """
    by_layer = dict(recalls) if isinstance(recalls, Mapping) else dict(enumerate(recalls))
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share of layers must be in 0..1, got {share}")
    count = math.floor(share * len(by_layer) + 0.5)
    return sorted(sorted(by_layer, key=lambda layer: (-by_layer[layer], layer))[:count])
