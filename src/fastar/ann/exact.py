"""Exact nearest neighbours: one matrix product per problem, in blocks that bound the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Matcher, Metric, check_features


class ExactMatcher(Matcher):
    """The definition every other matcher is measured against.

    Args:
        max_scores: how many scores are held at a time; more queries than that allows are taken in blocks.
    """

    def __init__(self, *, max_scores: int = 2**26) -> None:
        self.max_scores = max_scores

    def nearest(
        self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None, metric: Metric = "dot"
    ) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        problems, count = queries.shape[:2]
        if keys.shape[1] == 0 or count == 0:
            return no_match(queries)
        # |x - y|^2 = |x|^2 - 2 (x.y - |y|^2 / 2): the nearest key has the largest x.y - |y|^2 / 2.
        offset = torch.zeros_like(keys[..., 0]) if metric == "dot" else keys.square().sum(-1) * -0.5
        if valid is not None:
            offset = offset.masked_fill(~valid, -torch.inf)
        block = max(1, self.max_scores // (problems * keys.shape[1]))
        best = [torch.baddbmm(offset[:, None], part, keys.mT).max(-1) for part in queries.split(block, dim=1)]
        score, index = torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)
        if metric == "euclidean":
            score = (2 * score - queries.square().sum(-1)).clamp_max(0)
        return torch.where(score == -torch.inf, -1, index), score


def no_match(queries: Tensor) -> tuple[Tensor, Tensor]:
    """The answer when there is nothing to find: index -1, score -inf, for queries [N, n, d]."""
    shape, device = queries.shape[:2], queries.device
    return torch.full(shape, -1, device=device), queries.new_full(shape, -torch.inf)
