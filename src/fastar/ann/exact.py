"""Exact nearest neighbours: one matrix product per problem, in blocks that bound the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.ann.base import Excluded, Matcher, Metric, check_features, exclude, found_from, key_offset


class ExactMatcher(Matcher):
    """The definition every other matcher is measured against.

    Args:
        max_scores: how many scores are held at a time; more queries than that allows are taken in blocks.
    """

    def __init__(self, *, max_scores: int = 2**26) -> None:
        self.max_scores = max_scores

    def exact(self) -> Matcher:
        return self

    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        valid: Tensor | None = None,
        excluded: Excluded | None = None,
        metric: Metric = "dot",
    ) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        problems, count = queries.shape[:2]
        if keys.shape[1] == 0 or count == 0:
            return no_match(queries)
        offset = key_offset(keys, valid, metric)
        block = max(1, self.max_scores // (problems * keys.shape[1]))
        best = []
        for start in range(0, count, block):
            part = slice(start, start + block)
            score = torch.baddbmm(offset[:, None], queries[:, part], keys.mT)
            best.append(exclude(score, excluded, part).max(-1))
        return found_from(best, queries, metric)


def no_match(queries: Tensor) -> tuple[Tensor, Tensor]:
    """The answer when there is nothing to find: index -1, score -inf, for queries [N, n, d]."""
    shape, device = queries.shape[:2], queries.device
    return torch.full(shape, -1, device=device), queries.new_full(shape, -torch.inf)
