"""Does the key that TempCache matches a token with show the same thing? Matches held against the true motion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.data.motion import Motion
from fastar.metrics.redundancy.means import MeanTable

SEARCHES = ("previous", "any")
"""Keys of the frame before, or of all earlier frames."""
DISTANCES = (0, 1)
"""Tokens, in each direction, that a match may be away from the truth."""


@dataclass(frozen=True)
class TrueTokens:
    """The truth about the tokens of one chunk.

    Attributes:
        frames: int64 [N], of each token. own: int64 [N, 2], its row and column.
        places: int64 [F, N, 2], where its point was in each frame of the video so far. visible: bool [F, N].
        groups: bool [G, N], of `group_names`.
    """

    frames: Tensor
    own: Tensor
    places: Tensor
    visible: Tensor
    groups: Tensor

    @property
    def known(self) -> Tensor:
        """bool [N]: tokens whose point the frame before showed, so that there is something to find."""
        before = self.frames - 1
        seen = self.visible[before.clamp(min=0), torch.arange(len(before))]
        return seen & (before >= 0)


def group_names(motion: Motion) -> tuple[str, ...]:
    """Tokens told apart: all; those whose point was in another token in the frame before; each region."""
    return ("all", "moved", *motion.regions)


def true_tokens(motion: Motion, positions: Tensor, columns: int) -> TrueTokens:
    """The truth about tokens at `positions` int64 [N, 3] (frame, row, column), in frames of `columns` tokens a row."""
    numbers, own = positions[:, 0], positions[:, 1:]
    last, tokens = int(numbers.max()), own[:, 0] * columns + own[:, 1]
    places = torch.zeros(max(last, 1), len(tokens), 2, dtype=torch.long)
    visible = torch.zeros(max(last, 1), len(tokens), dtype=torch.bool)
    regions = torch.zeros(len(tokens), dtype=torch.long)
    for frame in numbers.unique().tolist():
        mine = numbers == frame
        regions[mine] = motion.region(frame)[tokens[mine]]
        if frame > 0:
            where, seen = motion.locate(frame, range(frame))
            places[:frame, mine], visible[:frame, mine] = where[:, tokens[mine]], seen[:, tokens[mine]]
    before = places[(numbers - 1).clamp(min=0), torch.arange(len(numbers))]
    groups = [torch.ones_like(regions, dtype=torch.bool), (before != own).any(-1)]
    groups += [regions == number for number in range(len(motion.regions))]
    return TrueTokens(numbers, own, places, visible, torch.stack(groups))


class CorrespondenceAccuracy(MeanTable):
    """Share of matches that are right, [matchers + 1, searches, distances, layers, heads, groups].

    Counted are tokens whose point the frame before showed. A match is right if its frame shows the token's point, at
    most so many tokens away. The last "matcher" takes the same place in the frame that the first one chose: what is
    right without looking at content. Chance is one in the tokens of a frame.

    Args:
        num_layers, num_heads: of the backbone.
        num_matchers: ways of matching that are compared.
        num_groups: of `group_names`.
    """

    def __init__(self, num_layers: int, num_heads: int, *, num_matchers: int, num_groups: int) -> None:
        super().__init__(num_matchers + 1, len(SEARCHES), len(DISTANCES), num_layers, num_heads, num_groups)

    def update(
        self, layer: int, scores: Sequence[Tensor], positions: Tensor, live: Tensor, truth: TrueTokens
    ) -> None:
        """Add one call of one video.

        Args:
            layer: index.
            scores: of each matcher, [H, N, S]: how well a token matches a slot.
            positions: int64 [H, S, 3] of the slots, (frame, row, column).
            live: bool [H, S], slots that are not empty.
            truth: of the N tokens.
        """
        frames = positions[:, None, :, 0]
        for search in range(len(SEARCHES)):
            lag = truth.frames[:, None] - frames  # [H, N, S]
            allowed = ((lag == 1) if SEARCHES[search] == "previous" else (lag >= 1)) & live[:, None]
            counted = truth.known & allowed.any(-1)  # [H, N]
            for matcher, score in enumerate(scores):
                index = score.masked_fill(~allowed, -torch.inf).argmax(-1)
                found = positions.gather(1, index[..., None].expand(*index.shape, 3))
                self._judge(matcher, search, layer, found[..., 0], found[..., 1:], counted, truth)
                if matcher == 0:
                    own = truth.own.expand(len(found), -1, -1)
                    self._judge(len(scores), search, layer, found[..., 0], own, counted, truth)

    def _judge(
        self, matcher: int, search: int, layer: int, frames: Tensor, places: Tensor, counted: Tensor, truth: TrueTokens
    ) -> None:  # fmt: skip
        """Matches in `frames` [H, N] at `places` [H, N, 2]; `counted` bool [H, N]."""
        token = torch.arange(frames.shape[1]).expand_as(frames)
        frames = frames.clamp(max=len(truth.visible) - 1)  # of a token that has no match and does not count
        off = (places - truth.places[frames, token]).abs().amax(-1)
        seen = truth.visible[frames, token]
        for number, distance in enumerate(DISTANCES):
            right = seen & (off <= distance) & counted
            both = (right[:, None] & truth.groups).sum(-1), (counted[:, None] & truth.groups).sum(-1)
            self._add((matcher, search, number, layer), *both)
