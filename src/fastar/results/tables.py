"""From the tidy table to results with spread: means over independent runs and their bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from fastar.metrics.bootstrap import Interval, interval, paired_difference
from fastar.metrics.names import METRICS, decimals_of, shown_as
from fastar.results.loading import FAILURE

NOTHING = Interval(mean=float("nan"), low=float("nan"), high=float("nan"), n=0)

UNITS = ("seed", "clip")
"""Columns that tell independent repetitions apart; chunks of one clip are averaged first."""


def spread(
    rows: pd.DataFrame,
    *,
    index: str | Sequence[str] = "method",
    metrics: Sequence[str] | None = None,
    units: Sequence[str] = UNITS,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean and bootstrap interval of each metric per `index`, over independent units.

    Args:
        rows: what `fastar.results.load` returns.
        index: column or columns that name a line of the table. Give `["method", "frame"]` for curves.
        metrics: which, in this order; all by default.
        units: columns whose combinations are independent repetitions; values of one unit are averaged first.
        level: of the interval.

    Returns:
        Columns of `index`, then metric, mean, low, high, n (units), missing (units whose value is NaN; left out).
        In the order in which lines and metrics first appear.
    """
    lines = _as_list(index)
    per_unit = _per_unit(rows, lines, metrics, units)
    records = []
    for key, group in per_unit.groupby([*lines, "metric"], sort=False, dropna=False, observed=True):
        found = group["value"].dropna()
        stats = interval(found, level=level) if len(found) else NOTHING
        named = dict(zip([*lines, "metric"], key, strict=True))
        records.append({**named, **vars(stats), "missing": len(group) - len(found)})
    return pd.DataFrame(records, columns=[*lines, "metric", "mean", "low", "high", "n", "missing"])


def differences(
    rows: pd.DataFrame,
    *,
    baseline: str,
    index: str = "method",
    metrics: Sequence[str] | None = None,
    units: Sequence[str] = UNITS,
    level: float = 0.95,
) -> pd.DataFrame:
    """`spread` of each line's paired difference to the line `baseline`, on the units both have.

    Raises:
        ValueError: there is no such line.
    """
    per_unit = _per_unit(rows, [index], metrics, units)
    if baseline not in set(per_unit[index]):
        choices = ", ".join(map(str, per_unit[index].unique()))
        raise ValueError(f"no {index} is called {baseline!r}: choose one of {choices}")
    records = []
    for metric, group in per_unit.groupby("metric", sort=False):
        wide = group.pivot_table(index=[*units], columns=index, values="value", dropna=False, sort=False)
        for line in (line for line in group[index].unique() if line != baseline):
            pairs = wide[[line, baseline]].dropna() if baseline in wide else wide.iloc[:0]
            if len(pairs):
                stats = paired_difference(pairs[line], pairs[baseline], level=level)
                records.append(
                    {index: line, "metric": metric, **vars(stats), "missing": len(wide) - len(pairs)}
                )
    return pd.DataFrame(records, columns=[index, "metric", "mean", "low", "high", "n", "missing"])


def failures(rows: pd.DataFrame, *, index: str = "method") -> pd.DataFrame:
    """Failed runs: columns index, seed, reason."""
    columns = [index, "seed", "reason"]
    return rows.loc[rows["metric"] == FAILURE, columns].reset_index(drop=True)


def pivot(stats: pd.DataFrame) -> pd.DataFrame:
    """`spread` or `differences` as text: a line per index, a column per metric, cells `mean [low, high]`."""
    lines = [str(name) for name in stats.columns[: stats.columns.get_loc("metric")]]
    cells = stats[lines].copy()
    cells["metric"] = [heading(name) for name in stats["metric"]]
    scales = np.array([shown_as(metric)[0] for metric in stats["metric"]])
    numbers = zip(
        stats["mean"] / scales, stats["low"] / scales, stats["high"] / scales, stats["n"], strict=True
    )
    cells["cell"] = [
        format_interval(Interval(*found), decimals_of(metric))
        for metric, found in zip(stats["metric"], numbers, strict=True)
    ]
    wide = cells.pivot(index=lines, columns="metric", values="cell")
    wide = wide.reindex(columns=cells["metric"].unique())
    order = cells[lines].drop_duplicates()
    wide = wide.reindex(pd.MultiIndex.from_frame(order) if len(lines) > 1 else order[lines[0]])
    text: pd.DataFrame = wide.fillna("–").reset_index()
    text.columns.name = None
    return text


def to_markdown(table: pd.DataFrame) -> str:
    """A table of text as GitHub markdown, first column left, others right."""
    rules = [":--"] + ["--:"] * (table.shape[1] - 1)
    body = [[str(cell).replace("|", "\\|") for cell in line] for line in table.itertuples(index=False)]
    lines = [[str(name) for name in table.columns], rules, *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_rich(table: pd.DataFrame, *, title: str | None = None) -> Table:
    """A table of text for the console."""
    printed = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(table.columns):
        printed.add_column(str(name), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for line in table.itertuples(index=False):
        printed.add_row(*(Text(str(cell)) for cell in line))  # Text: [low, high] is not markup
    return printed


def format_interval(stats: Interval, decimals: int) -> str:
    """`mean [low, high]`; the mean alone where there is no interval, or none that these decimals show."""
    if np.isnan(stats.mean):
        return "–"
    # + 0.0: no minus before a zero
    mean, low, high = (
        f"{round(value, decimals) + 0.0:,.{decimals}f}" for value in (stats.mean, stats.low, stats.high)
    )
    return mean if np.isnan(stats.low) or low == high == mean else f"{mean} [{low}, {high}]"


def heading(metric: str) -> str:
    """Column heading: name, unit, and an arrow to where better is."""
    info = METRICS.get(metric.split("/")[0])
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}[info.better] if info else ""
    unit = shown_as(metric)[1]
    return f"{metric} ({unit}){arrow}" if unit else f"{metric}{arrow}"


def _per_unit(
    rows: pd.DataFrame, lines: Sequence[str], metrics: Sequence[str] | None, units: Sequence[str]
) -> pd.DataFrame:
    """One value per line, metric and independent unit."""
    absent = [name for name in [*lines, *units] if name not in rows]
    if absent:
        raise ValueError(
            f"the table has no column {', '.join(absent)}: it has {', '.join(map(str, rows.columns))}"
        )
    chosen = rows[rows["metric"] != FAILURE]
    if metrics is not None:
        chosen = chosen[chosen["metric"].isin(metrics)]
        ranks = {name: rank for rank, name in enumerate(metrics)}
        chosen = chosen.sort_values("metric", key=lambda names: names.map(ranks), kind="stable")
    keys = [*lines, "metric", *units]
    # skipna: a clip may lack a value in some chunks (no returning pixels there), not in all
    means = chosen.groupby(keys, sort=False, dropna=False, observed=True)["value"].mean()
    return means.reset_index()


def _as_list(index: str | Sequence[str]) -> list[str]:
    return [index] if isinstance(index, str) else list(index)
