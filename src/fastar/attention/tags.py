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
        # of chunks in flight, by first frame, step and layer: int64 [B, H, Lq]
        self._current: dict[int, dict[int, dict[int, Tensor]]] = {}

    def on_attend(self, event: AttendEvent) -> None:
        """Tag the tokens of a call of cross-attention."""
        if event.stream != "text" or event.selection is None:
            return
        if self.selector.tag_layer not in (None, event.layer):
            return
        tags = self.selector.tag(event.q, event.selection.prompt)
        context = event.context
        if context.kind == PassKind.DENOISE:
            own = self._current.setdefault(context.first_frame, {})
            for later in [step for step in own if step > context.step]:
                del own[later]  # the chunk is started over
            own.setdefault(context.step, {})[event.layer] = tags
        else:
            self._commit(event.layer, context, tags)

    def of(
        self, layer: int, context: PassContext, cached: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tags of the queries [B, H, Lq] and of all keys [B, H, S + Lk], int64; None for both in a chunk's first pass.

        Keys of the cache come first, then those of the frames in flight, of which only the chunk's own are tagged.

        Args:
            layer, context: of the call of self-attention.
            cached: int64 [B, H, S, 3], where the tokens of the cached slots stand, or None if there are none.
        """
        source = layer if self.selector.tag_layer is None else self.selector.tag_layer
        if context.kind == PassKind.REWRITE:
            return None, None  # frames that are rewritten start afresh, maybe under another prompt
        known = self._current.get(context.first_frame, {})
        earlier = [s for s in known if context.kind != PassKind.DENOISE or s < context.step]
        own = known[max(earlier)].get(source) if earlier else None
        if own is None:
            return None, None
        first, stop = context.visible
        tokens = own.shape[2] // context.num_frames
        around = (context.first_frame - first, stop - context.first_frame - context.num_frames)
        before, after = (own.new_full((*own.shape[:2], frames * tokens), WILDCARD) for frames in around)
        keys = [before, own, after] if any(around) else [own]
        if cached is not None and cached.shape[2]:
            keys = [self._at(source, cached), *keys]
        return own, keys[0] if len(keys) == 1 else torch.cat(keys, dim=2)

    def state_dict(self) -> dict[int, Tensor]:
        """Committed tags by layer, as copies on the CPU."""
        return {layer: tags.cpu().clone() for layer, tags in self._committed.items()}

    def load_state_dict(self, saved: dict[int, Tensor], device: torch.device) -> None:
        """Continue from `state_dict`."""
        self._committed = {layer: tags.to(device) for layer, tags in saved.items()}
        self._current = {}

    def prompt_changed(self) -> None:
        """Tags were about another prompt: what was tagged so far is read by every query."""
        self._current = {}
        for tags in self._committed.values():
            tags.fill_(WILDCARD)

    def forget(self, next_frame: int) -> None:
        """Frames before `next_frame` are committed: the tags of their passes are over."""
        self._current = {first: known for first, known in self._current.items() if first >= next_frame}

    def in_flight(self) -> dict[int, dict[int, dict[int, Tensor]]]:
        """Tags of chunks in flight by first frame, step and layer: each one's last step, which the next pass reads."""
        return {first: {max(known): dict(known[max(known)])} for first, known in self._current.items()}

    def restore_in_flight(self, saved: dict[int, dict[int, dict[int, Tensor]]], device: torch.device) -> None:
        """Go on from `in_flight`."""
        self._current = {
            first: {
                step: {layer: tags.to(device) for layer, tags in by.items()} for step, by in known.items()
            }
            for first, known in saved.items()
        }

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
