"""A budget of prompt tokens: the best-scored share is kept, where AnnCA keeps whatever shares a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.engines.plan import inverse_order
from fastar.sparsity.base import (
    PADDINGS,
    CrossSelector,
    Padding,
    PromptKeys,
    Rebuild,
    ScheduleOptions,
    check_choice,
)
from fastar.sparsity.prompt_scores import TokenScorer

Scope = Literal["layer", "prompt"]


@dataclass
class _Scored:
    """What was scored for a chunk in flight, by layer."""

    scores: dict[int, Tensor] = field(default_factory=dict)  # of the pass that decides
    gathered: dict[int, Tensor] = field(default_factory=dict)  # of the pass that is going on
    deciding: int | None = None  # step of that pass
    going_on: int | None = None

    def close(self, following: int | None) -> None:
        """The pass that went on is over, unless the chunk is started over by step `following`."""
        past, self.going_on = self.going_on, following
        seen = [step for step in (past, self.deciding) if step is not None]
        if following is not None and any(following <= step for step in seen):
            self.deciding, self.scores = None, {}
        elif past is not None and self.gathered:
            self.deciding, self.scores = past, self.gathered
        self.gathered = {}


class RankedCA(CrossSelector):
    """Keeps the `share` of the real prompt tokens that scores best.

    With `scope=layer` a layer decides for itself: in every pass by that pass's own queries, or by those of the chunk's
    first pass (`rebuild=chunk`). With `scope=prompt` one decision serves all layers and heads, by the scores of
    `score_layers` added up over heads: those of the chunk's first pass, or of the pass before. It costs a pass nothing
    that the decision came earlier; the first pass of a chunk reads all tokens then, whatever the schedule, and so do
    prefill and rewrite passes, which no other goes before. A commit pass is the last of its chunk.

    Args:
        scorer: of tokens; `ExactMass` with `scope=layer, rebuild=pass` is the oracle.
        share: of the real tokens, in (0, 1]; rounded up. As many are kept in every call.
        scope, rebuild: see above.
        score_layers: layers whose scores count in `scope=prompt`: those in which words matter; None: all.
        shared_heads: with `scope=layer`, add up the scores of the heads and decide for all of them.
        padding: see `CrossSelector`.
        layers, warmup_share, min_dense_steps, commit_dense: see `Scheduled`.
    """

    keeps_as_many = True

    def __init__(
        self,
        *,
        scorer: TokenScorer,
        share: float = 0.35,
        scope: Scope = "prompt",
        rebuild: Rebuild = "chunk",
        score_layers: Sequence[int] | None = None,
        shared_heads: bool = False,
        padding: Padding = "attended",
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(**schedule)
        check_choice("scope", scope, ("layer", "prompt"))
        check_choice("rebuild", rebuild, ("pass", "chunk"))
        check_choice("padding", padding, PADDINGS)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share is of the prompt's tokens, in (0, 1], got {share}")
        if score_layers is not None and not score_layers:
            raise ValueError("score_layers names no layer: name those whose scores count, or null for all")
        self.scorer, self.share, self.scope, self.rebuild = scorer, share, scope, rebuild
        self.score_layers = None if score_layers is None else frozenset(score_layers)
        self.shared_heads, self.padding = shared_heads, padding
        self._chunks: dict[int, _Scored] = {}  # by first frame

    def observe(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> None:
        """Score the tokens if a later call will ask for it."""
        if context.kind != PassKind.DENOISE:
            return
        chunk = self._chunks.setdefault(context.first_frame, _Scored())
        if context.step != chunk.going_on:
            chunk.close(context.step)
        if self.rebuild == "chunk" and chunk.deciding is not None:
            return  # decided, in an earlier pass of this chunk
        if self.scope == "prompt" and self.score_layers is not None and layer not in self.score_layers:
            return
        if self.scope == "prompt" or self.rebuild == "chunk":
            chunk.gathered[layer] = self.scorer.score(q, prompt)

    def select(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor | None:
        """The best-scored tokens, [B, H, S] bool; None for all in dense passes and layers."""
        if self.is_dense(layer, context):
            return None
        if self.scope == "layer":
            scores = self._own_scores(layer, context, q, prompt)
            scores = scores.sum(1, keepdim=True) if self.shared_heads else scores
        else:
            decided = self._decided(context)
            if not decided:
                return None
            scores = torch.stack(list(decided.values())).sum(0).sum(1, keepdim=True)
        return best_share(scores.expand(prompt.real.shape), prompt.real, self.share)

    def _own_scores(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor:
        if self.rebuild == "pass":
            return self.scorer.score(q, prompt)
        # within the chunk's first pass that pass's own scores count
        found = self._decided(context).get(layer)
        if found is None and context.kind == PassKind.DENOISE:
            found = self._chunks[context.first_frame].gathered.get(layer)
        return self.scorer.score(q, prompt) if found is None else found

    def _decided(self, context: PassContext) -> dict[int, Tensor]:
        """Scores of an earlier pass of this chunk, by layer; empty if there is none."""
        if context.kind in (PassKind.PREFILL, PassKind.REWRITE):
            return {}  # the prompt may have changed
        chunk = self._chunks.get(context.first_frame)
        if chunk is None:
            return {}
        if context.kind == PassKind.COMMIT:
            chunk.close(None)  # the last denoising step is over
        return chunk.scores

    def forget(self, next_frame: int) -> None:
        self._chunks = {first: chunk for first, chunk in self._chunks.items() if first >= next_frame}

    def in_flight(self) -> dict[int, Any]:
        return {
            first: {
                name: dict(kept) if isinstance(kept, dict) else kept for name, kept in vars(chunk).items()
            }
            for first, chunk in self._chunks.items()
        }

    def restore_in_flight(self, saved: dict[int, Any], device: torch.device) -> None:
        self._chunks = {}
        for first, kept in saved.items():
            chunk = self._chunks[first] = _Scored(**kept)
            chunk.scores = {layer: scores.to(device) for layer, scores in chunk.scores.items()}
            chunk.gathered = {layer: scores.to(device) for layer, scores in chunk.gathered.items()}


def best_share(scores: Tensor, real: Tensor, share: float) -> Tensor:
    """The best-scored share of the real tokens, rounded up: scores and real [B, H, S] -> bool [B, H, S].

    Ties go to the earlier token.
    """
    quota = (real.sum(-1, keepdim=True).double() * share - 1e-9).ceil()
    order = torch.argsort(scores.masked_fill(~real, -torch.inf), dim=-1, descending=True, stable=True)
    return (inverse_order(order) < quota) & real
