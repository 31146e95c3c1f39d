"""The paper's tables beside ours: its numbers in italics, as it prints them, ours under them in the same columns."""

from collections.abc import Mapping, Sequence

import pandas as pd

from fastar.metrics.bootstrap import Interval
from fastar.metrics.names import decimals_of
from fastar.results.figures import ANALYSIS
from fastar.results.tables import format_interval, spread

NONE = "–"
"""What is not there: not reported, or not measured."""

LEAD = ("protocol", "clips")
"""Columns of ours that stand before the paper's; all others stand after them."""


def printed(number: int) -> pd.DataFrame:
    """A table of the paper (arXiv 2602.01801) as text; density and recall are shares there, not per cent.

    Raises:
        ValueError: it is not transcribed.
    """
    path = ANALYSIS / "paper" / f"table_{number}.csv"
    if not path.exists():
        raise ValueError(
            f"table {number} of the paper is not in {path.parent}: there are "
            f"{', '.join(sorted(each.stem for each in path.parent.glob('table_*.csv')))}"
        )
    return pd.read_csv(path, dtype=str)


def measured(rows: pd.DataFrame, metrics: Sequence[str]) -> dict[str, str]:
    """One line of ours: `mean [low, high]` of each metric by its name, and `clips`, over how many.

    Args:
        rows: of one method and setting, as `fastar.results.load` returns them.
        metrics: which; one that is not recorded is left out.

    Raises:
        ValueError: no rows.
    """
    if rows.empty:
        raise ValueError(
            "no rows of this line are recorded: compare the labels asked for with those that load returns"
        )
    stats = spread(rows.assign(line=0), index="line", metrics=metrics)
    cells = {
        each.metric: format_interval(
            Interval(each.mean, each.low, each.high, each.n), decimals_of(each.metric)
        )
        for each in stats.itertuples()
    }
    seeds = rows["seed"].iloc[0]
    return cells | {"clips": str(len(seeds) if isinstance(seeds, tuple) else rows["seed"].nunique())}


def beside(paper: pd.DataFrame, ours: Sequence[tuple[str, Mapping[str, str]]]) -> pd.DataFrame:
    """The paper's lines in italics, each followed by ours of its name; ours of other names come last.

    Args:
        paper: as `printed` returns it; its first column names the methods.
        ours: the name in the paper and the cells of each of our lines, by column.
    """
    first, *others = paper.columns
    lines = []
    for line in paper.to_dict("records"):
        lines.append({name: cell if cell == NONE else f"*{cell}*" for name, cell in line.items()})
        lines += [dict(cells) for name, cells in ours if name == line[first]]
    known = set(paper[first])
    lines += [dict(cells) for name, cells in ours if name not in known]
    named = dict.fromkeys(name for _, cells in ours for name in cells)
    lead = [name for name in LEAD if name in named]
    extra = [name for name in named if name not in (*LEAD, *paper.columns)]
    return pd.DataFrame(lines, columns=[first, *lead, *others, *extra]).fillna(NONE)


def latency_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """What a table's own latencies give as speed-ups, beside the printed ones: columns own x and printed / own.

    Args:
        table: columns model, latency s and speed-up x as text; the first line of each model is its baseline.
    """
    latency = table["latency s"].astype(float)
    own = latency.groupby(table["model"], sort=False).transform("first") / latency
    said = pd.to_numeric(table["speed-up x"], errors="coerce")
    share = said / own
    return table.assign(
        **{
            "own x": own.map("{:.2f}".format),
            "printed / own": share.map(lambda value: NONE if pd.isna(value) else f"{value:.2f}"),
        }
    )
