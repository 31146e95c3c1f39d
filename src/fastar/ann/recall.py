"""How often an approximate matcher finds what the exact one finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastar.ann.base import Excluded, Matcher, Metric
from fastar.ann.exact import ExactMatcher


def recall_at_1(
    matcher: Matcher,
    queries: Tensor,
    keys: Tensor,
    *,
    valid: Tensor | None = None,
    excluded: Excluded | None = None,
    metric: Metric = "dot",
) -> Tensor:
    """Share of the queries for which `matcher` finds the best key, or one just as good: a scalar on their device.

    Arguments as in `Matcher.nearest`; the best is what `ExactMatcher` finds in float32. Both answers are judged by the
    pair itself, in float64, so that equal keys count as one. Queries that have no key to match are left out; NaN if
    that is all of them.
    """
    among: dict[str, Any] = {"valid": valid, "excluded": excluded, "metric": metric}
    exact, _ = ExactMatcher().nearest(queries.float(), keys.float(), **among)
    found, _ = matcher.nearest(queries, keys, **among)
    best, value = (_value(queries, keys, index, metric) for index in (exact, found))
    return ((value >= best) & (exact >= 0)).sum() / (exact >= 0).sum()


def _value(queries: Tensor, keys: Tensor, index: Tensor, metric: Metric) -> Tensor:
    """What the pairs of queries and keys at `index` [N, n] are worth, -inf where it is -1: float64 [N, n]."""
    chosen = keys.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, keys.shape[2])).double()
    queries = queries.double()
    value = (queries * chosen).sum(-1) if metric == "dot" else -(queries - chosen).square().sum(-1)
    return value.masked_fill(index < 0, -torch.inf)
