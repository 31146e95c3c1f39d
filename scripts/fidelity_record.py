"""Means and intervals of runs of experiment=speed_fidelity, as a small record for scripts/speed_tables.py.

    python scripts/fidelity_record.py outputs/speed_fidelity analysis/results/speed/fidelity_doom.json

A line of `rows` is a method, budget, protocol and setting; a score is mean, low and high of a 95 % bootstrap interval
over clips, chunks of a clip averaged first. Bytes and slots are those after the last chunk, density is a mean.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from fastar.compare.report import per_seed
from fastar.results import load, load_runs
from fastar.results.files import write_json
from fastar.results.loading import FAILURE
from fastar.results.tables import spread

SCORES = ("recall", "output_error", "psnr", "psnr/truth", "revisit_psnr", "presence", "latent_error")
HELD = ("byte_share", "slot_share")
LINE = ["method", "budget_share", "protocol", "block", "passes"]
SHARED = ("dtype", "prefill_frames", "frames", "source")


def record(runs: str) -> dict[str, Any]:
    """What is told of the runs below a folder.

    Raises:
        ValueError: there are none, or they were made on several kinds of machine or with several settings.
    """
    rows, made = load(runs), load_runs(runs, config=SHARED)
    for column in LINE:
        if column not in rows:
            rows[column] = pd.NA
    card = {name: _only(made, name) for name in ("backbone", "device", *SHARED)}
    card |= {"day": min(made["time"])[:10], "code": sorted({str(commit)[:8] for commit in made["commit"]})}
    rows = per_seed(rows)
    card["clips"] = int(rows.loc[rows["metric"] == "latent_error", "seed"].nunique())
    failed = rows[rows["metric"] == FAILURE]
    last = rows["chunk"] == rows.groupby(["run_id", "metric"])["chunk"].transform("max")
    rows = rows[last | ~rows["metric"].isin(HELD)]
    stats = spread(rows, index=LINE, metrics=[*SCORES, *HELD, "density"])
    lines = []
    for key, group in stats.groupby(LINE, sort=False, dropna=False):
        line = {name: value for name, value in zip(LINE, key, strict=True) if not pd.isna(value)}
        for row in group.itertuples():
            numbers = [row.mean, row.low, row.high] if row.metric in SCORES else [row.mean]
            numbers = [None if pd.isna(x) else round(float(x), 4) for x in numbers]
            line[row.metric] = numbers if len(numbers) > 1 else numbers[0]
        lines.append(line)
    for row in failed.itertuples():
        line = {name: getattr(row, name) for name in LINE if not pd.isna(getattr(row, name))}
        lines.append(line | {"reason": row.reason})
    return {"card": card, "rows": lines}


def _only(runs: pd.DataFrame, column: str) -> Any:
    found = list(runs[column].dropna().unique())
    if len(found) != 1:
        raise ValueError(f"these runs differ in {column} ({found}): record each kind by itself")
    return found[0].item() if hasattr(found[0], "item") else found[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", help="folder of the runs")
    parser.add_argument("record", type=Path)
    given = parser.parse_args()
    write_json(given.record, record(given.runs))
