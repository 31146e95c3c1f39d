"""Differences at equal cost: interpolated seed by seed, never extrapolated."""

import math

import pandas as pd
import pytest

from fastar.results.equal_cost import differences_at_equal_cost


def rows_of(points: dict[tuple[str, float, int], tuple[float, float]]) -> pd.DataFrame:
    """Tidy rows of (method, point, seed) -> (slots, error)."""
    return pd.DataFrame(
        [
            {"method": method, "point": point, "seed": seed, "clip": None, "metric": metric, "value": value}
            for (method, point, seed), values in points.items()
            for metric, value in zip(("slots", "error"), values, strict=True)
        ]
    )


LINE = {("line", p, s): (p, (1 + s) * (1 - p)) for p in (0.2, 0.6, 1.0) for s in (0, 1)}


def test_a_point_is_held_against_its_own_seeds_line() -> None:
    found = differences_at_equal_cost(
        rows_of({**LINE, ("new", 7, 0): (0.4, 0.5), ("new", 7, 1): (0.8, 0.2), ("new", 8, 0): (0.1, 0.0)}),
        baseline="line",
        cost="slots",
        metric="error",
    )
    near, outside = found.to_dict("records")
    assert (near["point"], near["n"], near["missing"]) == (7, 2, 0)
    assert near["mean"] == pytest.approx((0.5 - 0.6 + 0.2 - 0.4) / 2) and near["cost"] == pytest.approx(0.6)
    assert near["low"] == pytest.approx(-0.2) and near["high"] == pytest.approx(-0.1)
    assert outside["n"] == 0 and outside["missing"] == 1 and math.isnan(outside["mean"])


def test_one_point_is_no_line() -> None:
    alone = {key: value for key, value in LINE.items() if key[1] == 0.2}
    for points, baseline in ((alone, "line"), (LINE, "other")):
        with pytest.raises(ValueError, match="needs two points or more"):
            differences_at_equal_cost(rows_of(points), baseline=baseline, cost="slots", metric="error")
