"""Prompt buckets of latent tokens: what cross-attention says a token shows, for self-attention to select by.

The text stream of a pass tags the tokens of its chunk; self-attention of the next pass reads these tags as its
queries', and tokens that are committed keep the tags of their commit pass (paper section 1, "AnnSA").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.engines.plan import WILDCARD

if TYPE_CHECKING:
    from fastar.attention.events import AttendEvent
    from fastar.sparsity.base import CrossSelector, Selector


class PromptTags:
    """Tags of all committed tokens and of the current chunk's, by layer. A recorder of the text stream.

    Committed tags are found by the position of a slot's key, so that any cache policy will do: a merged slot has the
    tag of the token whose position it took. They are kept for every frame, 4 bytes a head and token, whatever the cache
    forgets: no part of its budget.

    Args:
        selector: tags tokens (`CrossSelector.tag`).
        grid: rows and columns of tokens in a frame.
    """

    def __init__(self, selector: CrossSelector, grid: tuple[int, int]) -> None:
        self.selector, self.grid = selector, grid
        self._committed: dict[int, Tensor] = {}  # int32 [B, H, frames * rows * columns]
        self._current: dict[int, dict[int, Tensor]] = {}  # by step and layer: int64 [B, H, Lq]
        self._first_frame = -1

    def on_attend(self, event: AttendEvent) -> None:
        """Tag the tokens of a call of cross-attention."""
        if event.stream != "text" or event.selection is None:
            return
        if self.selector.tag_layer not in (None, event.layer):
            return
        tags = self.selector.tag(event.q, event.selection.prompt)
        context = event.context
        if context.kind == PassKind.DENOISE:
            if context.first_frame != self._first_frame:
                self._first_frame, self._current = context.first_frame, {}
            for later in [step for step in self._current if step > context.step]:
                del self._current[later]  # the chunk is started over
            self._current.setdefault(context.step, {})[event.layer] = tags
        else:
            self._commit(event.layer, context, tags)

    def of(
        self, layer: int, context: PassContext, cached: Tensor | None, queries: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tags of the queries [B, H, Lq] and of all keys [B, H, S + Lq], int64; None for both in a chunk's first pass.

        Args:
            layer, context: of the call of self-attention.
            cached: int64 [B, H, S, 3], positions of the cached slots' keys, or None if there are none.
            queries: tokens of the current chunk; its keys come last.
        """
        source = layer if self.selector.tag_layer is None else self.selector.tag_layer
        if context.first_frame != self._first_frame or context.kind == PassKind.REWRITE:
            return None, None  # frames that are rewritten start afresh, maybe under another prompt
        earlier = [s for s in self._current if context.kind != PassKind.DENOISE or s < context.step]
        own = self._current[max(earlier)].get(source) if earlier else None
        if own is None:
            return None, None
        if cached is None or cached.shape[2] == 0:
            return own, own
        return own, torch.cat([self._at(source, cached), own], dim=2)

    def state_dict(self) -> dict[int, Tensor]:
        """Committed tags by layer, as copies on the CPU."""
        return {layer: tags.cpu().clone() for layer, tags in self._committed.items()}

    def load_state_dict(self, saved: dict[int, Tensor], device: torch.device) -> None:
        """Continue from `state_dict`."""
        self._committed = {layer: tags.to(device) for layer, tags in saved.items()}
        self._current, self._first_frame = {}, -1

    def _commit(self, layer: int, context: PassContext, tags: Tensor) -> None:
        """Write the tags of committed frames; those of frames that were never tagged are read by every query."""
        start = context.first_frame * self.grid[0] * self.grid[1]
        stop = start + tags.shape[2]
        known = self._committed.get(layer, tags.new_empty(*tags.shape[:2], 0, dtype=torch.int32))
        if known.shape[2] < stop:
            more = known.new_full((*known.shape[:2], stop - known.shape[2]), WILDCARD)
            known = torch.cat([known, more], dim=2)
        known[:, :, start:stop] = tags
        self._committed[layer] = known

    def _at(self, layer: int, positions: Tensor) -> Tensor:
        """Tags of the tokens at positions [B, H, S, 3]."""
        known = self._committed[layer]
        frame, row, column = positions.unbind(-1)
        token = (frame * self.grid[0] + row) * self.grid[1] + column
        return known.gather(2, token.clamp(0, known.shape[2] - 1)).long()


class CommittedTags:
    """A recorder of another rollout whose commits fill this one's cache (protocol A): only its commits are tagged.

    Args:
        tags: of this rollout.
    """

    def __init__(self, tags: PromptTags) -> None:
        self.tags = tags

    def on_attend(self, event: AttendEvent) -> None:
        """Tag the tokens of a call in a pass that commits."""
        if event.context.commits:
            self.tags.on_attend(event)


def tags_for(
    self_selector: Selector, cross_selector: CrossSelector, grid: tuple[int, int]
) -> PromptTags | None:
    """What the selectors need: tags if self-attention asks for them.

    Raises:
        ValueError: it does, and cross-attention gives none.
    """
    if not self_selector.wants_tags:
        return None
    if not cross_selector.tags_tokens:
        raise ValueError(
            "self-attention asks for prompt buckets (source=prompt) and cross-attention gives none: "
            "use a text backbone with cross_attention=annca_* or token_tags, or source=content"
        )
    return PromptTags(cross_selector, grid)
