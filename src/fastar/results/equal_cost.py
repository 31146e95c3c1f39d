"""Lines of points against another line of points at equal cost, where no two of them cost the same."""

import numpy as np
import pandas as pd

from fastar.metrics.bootstrap import interval
from fastar.results.tables import NOTHING, UNITS


def differences_at_equal_cost(
    rows: pd.DataFrame, *, baseline: str, cost: str, metric: str, line: str = "method", point: str = "point"
) -> pd.DataFrame:
    """Paired differences to what the line `baseline` would have at the same cost: interpolated, clip by clip.

    A point outside the costs that the baseline covers with that clip is left out: nothing is extrapolated. Both metrics
    have to be logged of the same clips.

    Args:
        rows: what `fastar.results.load` returns, with a column `point` that tells the points of a line apart.
        baseline: of the column `line`.
        cost, metric: names of metrics; the mean over what is logged of a clip counts.

    Returns:
        Columns of line and point, then cost (mean over clips), mean, low, high (of the difference, 95 % interval over
        clips), n, missing (clips that were left out).

    Raises:
        ValueError: the baseline has no two points of any clip.
    """
    units = list(UNITS)
    chosen = rows[rows["metric"].isin([cost, metric])].assign(clip=rows["clip"].fillna(0))
    wide = chosen.pivot_table(
        index=[line, point, *units], columns="metric", values="value", aggfunc="mean"
    ).dropna()
    known = wide.xs(baseline, level=line) if baseline in wide.index.get_level_values(line) else wide.iloc[:0]
    curves = {clip: curve.sort_values(cost) for clip, curve in known.groupby(units) if len(curve) > 1}
    if not curves:
        raise ValueError(f"the line {baseline!r} needs two points or more of a clip to be interpolated")
    records = []
    for (name, label), found in wide.drop(baseline, level=line).groupby([line, point], sort=False):
        gaps = [
            value - np.interp(spent, curves[clip][cost], curves[clip][metric], left=np.nan, right=np.nan)
            for (_, _, *unit), spent, value in found[[cost, metric]].itertuples(name=None)
            if (clip := tuple(unit)) in curves
        ]
        inside = [gap for gap in gaps if not np.isnan(gap)]
        stats = interval(inside) if inside else NOTHING
        spent = {line: name, point: label, "cost": found[cost].mean()}
        records.append({**spent, **vars(stats), "missing": len(found) - len(inside)})
    return pd.DataFrame(records, columns=[line, point, "cost", "mean", "low", "high", "n", "missing"])
