"""A budget of prompt tokens: the best-scored share is kept, where AnnCA keeps whatever shares a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

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
        self._scores: dict[int, Tensor] = {}  # by layer: of the pass that decides
        self._gathered: dict[int, Tensor] = {}  # of the pass that is going on
        self._deciding: tuple[int, int] | None = None  # first frame and step of that pass
        self._going_on: tuple[int, int] | None = None

    def observe(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> None:
        """Score the tokens if a later call will ask for it."""
        if context.kind != PassKind.DENOISE:
            return
        now = (context.first_frame, context.step)
        if now != self._going_on:
            self._close(now)
        if self.rebuild == "chunk" and self._deciding is not None and self._deciding[0] == now[0]:
            return  # decided, in an earlier pass of this chunk
        if self.scope == "prompt" and self.score_layers is not None and layer not in self.score_layers:
            return
        if self.scope == "prompt" or self.rebuild == "chunk":
            self._gathered[layer] = self.scorer.score(q, prompt)

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
        found = self._decided(context).get(layer, self._gathered.get(layer))
        return self.scorer.score(q, prompt) if found is None else found

    def _decided(self, context: PassContext) -> dict[int, Tensor]:
        """Scores of an earlier pass of this chunk, by layer; empty if there is none."""
        if context.kind in (PassKind.PREFILL, PassKind.REWRITE):
            return {}  # the prompt may have changed
        if context.kind == PassKind.COMMIT:
            self._close(None)  # the last denoising step is over
        known = self._deciding is not None and self._deciding[0] == context.first_frame
        return self._scores if known else {}

    def _close(self, following: tuple[int, int] | None) -> None:
        """The pass that went on is over, unless its chunk is started over by `following`."""
        past, self._going_on = self._going_on, following
        if following is not None and any(seen and following[1] <= seen[1] for seen in (past, self._deciding)):
            self._deciding, self._scores = None, {}
        elif past is not None and self._gathered:
            self._deciding, self._scores = past, self._gathered
        self._gathered = {}


def best_share(scores: Tensor, real: Tensor, share: float) -> Tensor:
    """The best-scored share of the real tokens, rounded up: scores and real [B, H, S] -> bool [B, H, S].

    Ties go to the earlier token.
    """
    quota = (real.sum(-1, keepdim=True).double() * share - 1e-9).ceil()
    order = torch.argsort(scores.masked_fill(~real, -torch.inf), dim=-1, descending=True, stable=True)
    return (inverse_order(order) < quota) & real
