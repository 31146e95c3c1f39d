"""How similar new keys are to cached ones, beside what similarity means where nothing is redundant.

A cosine near 1 is no evidence: keys share a mean, before training too. So every number stands beside the same of
keys less their mean, of random pairs at the same lag, and (by the caller) of an untrained model. What counts for
attention is how far a merge would move the logits, E_q[(q . dk)^2] / D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.cache.merge import rows_of
from fastar.metrics.redundancy.lags import LAGS, lag_bins
from fastar.metrics.redundancy.means import Means, Tables, masked_mean, unit

THRESHOLDS = (0.7, 0.9, 0.95, 0.99)
KINDS = ("cosine", "centred")
"""Of the keys as they are, and less the mean cached key of their head."""
PAIRS = ("nearest", "random")
SAME = 2.0**-8
"""Relative distance up to which two keys are one: no more than rounding to bfloat16 may move a key."""


class KeySimilarity(Tables):
    """New keys against cached ones; dimensions are (kind, pairs, layer, head, ...), of `KINDS` and `PAIRS`.

    Nearest is by cosine of the kind. Random is another slot of the same frame as the nearest. The tables:
        cosine: mean, [2, 2, layers, heads]. above: share from each threshold on, [2, 2, layers, heads, thresholds].
        change: E[(q . dk)^2] / D, squared logits, [2, 2, layers, heads].
        value_change: |v - v'| / |v| of the pairs' values, [2, 2, layers, heads].
        by_lag: mean cosine of the nearest key among those of each bin of lags, [2, layers, heads, bins].
        identical: share with a cached key within `SAME`, [layers, heads].

    Args:
        num_layers, num_heads: of the backbone.
        thresholds, edges: of the shares and of the lags.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        edges: Sequence[int] = LAGS,
    ) -> None:
        sizes, pairs = (num_layers, num_heads), (len(KINDS), len(PAIRS))
        super().__init__(
            {
                "cosine": Means(*pairs, *sizes),
                "above": Means(*pairs, *sizes, len(thresholds)),
                "change": Means(*pairs, *sizes),
                "value_change": Means(*pairs, *sizes),
                "by_lag": Means(len(KINDS), *sizes, len(edges)),
                "identical": Means(*sizes),
            }
        )
        self.thresholds, self.edges = tuple(thresholds), tuple(edges)

    def update(
        self,
        layer: int,
        new: Tensor,
        past: Tensor,
        *,
        new_frames: Tensor,
        past_frames: Tensor,
        live: Tensor,
        queries: Tensor,
        new_values: Tensor,
        past_values: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Add one call; nothing if no slot is live.

        Args:
            layer: index.
            new: keys [B, H, N, D]. past: cached keys [B, H, S, D], in the same space (raw or roped).
            new_frames: int64 [N]. past_frames: int64 [B, H, S].
            live: bool [B, H, S], slots that are not empty.
            queries: [B, H, Q, D] in that space, for the change of logits.
            new_values, past_values: that go with the keys.
            generator: draws the random pairs.
        """
        if not bool(live.any()):
            return
        new, past, queries = (x.float() for x in (new, past, queries))
        count = new.shape[0] * new.shape[2]
        bins = lag_bins(new_frames[:, None] - past_frames[..., None, :], self.edges)
        mates = same_frame_mates(past_frames, live, generator)
        means = (None, masked_mean(past, live))
        for kind, mean in enumerate(means):
            directions = unit(past, mean)
            cosines = (unit(new, mean) @ directions.mT).masked_fill(~live[..., None, :], -2.0)
            best, index = cosines.max(-1)
            random = mates.gather(-1, index)
            for pairs, found in enumerate((index, random)):
                at = (kind, pairs, layer)
                cosine = best if pairs == 0 else cosines.gather(-1, found[..., None])[..., 0]
                self._add("cosine", at, cosine.sum((0, 2)), count)
                above = torch.stack([(cosine >= t).sum((0, 2)) for t in self.thresholds], -1)
                self._add("above", at, above, count)
                moved = new - _rows(past, found)
                self._add("change", at, logit_change(queries, moved).sum((0, 2)), count)
                values = (new_values - _rows(past_values, found)).float().norm(dim=-1)
                values = values / new_values.float().norm(dim=-1).clamp(min=1e-9)
                self._add("value_change", at, values.sum((0, 2)), count)
                if kind == 0 and pairs == 0:
                    same = moved.norm(dim=-1) <= SAME * new.norm(dim=-1)
                    self._add("identical", layer, same.sum((0, 2)), count)
            empty = cosines.new_full((*cosines.shape[:3], len(self.edges)), -2.0)
            nearest = empty.scatter_reduce(-1, bins.expand_as(cosines), cosines, "amax")
            there = nearest > -2.0
            self._add("by_lag", (kind, layer), (nearest * there).sum((0, 2)), there.sum((0, 2)))


def logit_change(queries: Tensor, moved: Tensor) -> Tensor:
    """E_q[(q . dk)^2] / D of key differences [B, H, N, D] over queries [B, H, Q, D]: [B, H, N], squared logits."""
    moment = queries.mT @ queries / queries.shape[-2]
    return ((moved @ moment) * moved).sum(-1) / queries.shape[-1]


def same_frame_mates(frames: Tensor, live: Tensor, generator: torch.Generator) -> Tensor:
    """For every live slot another live one of its frame, at random; itself if it is the only one.

    frames int64 [..., S], live bool [..., S] -> int64 [..., S].
    """
    draw = torch.rand(frames.shape, generator=generator, device=generator.device).to(frames.device)
    # empty slots sort behind all frames, a group of their own
    group = torch.where(live, frames, frames.max() + 1)
    order = (group.double() + draw * 0.999).argsort(-1)
    ordered = group.gather(-1, order)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    place = torch.arange(frames.shape[-1], device=frames.device).expand_as(frames)
    first = torch.where(starts, place, 0).cummax(-1).values
    ends = torch.cat([starts[..., 1:], torch.ones_like(starts[..., :1])], -1)
    following = torch.where(ends, first, place + 1)
    return torch.empty_like(order).scatter(-1, order, order.gather(-1, following))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at index [B, H, N]: [B, H, N, D]."""
    return rows_of(x.flatten(0, 1), index.flatten(0, 1)).unflatten(0, x.shape[:2])
