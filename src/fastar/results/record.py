"""Runs that a table or figure rests on, copied to where they are kept: settings and numbers, no videos, no states."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fastar.metrics.names import is_held, is_timing
from fastar.results.files import PROMPT, SUMMARY, TABLE, atomic, read_summary
from fastar.results.loading import find_runs
from fastar.results.rows import SCHEMA, to_pandas, write_table


def record_runs(
    pattern: str | Path | Sequence[str | Path], target: Path, *, timings: bool = True, curves: bool = True
) -> list[Path]:
    """Copy every finished or failed run that `pattern` names to `target`/<run id>; returns the copies.

    A run that is there already is replaced, unless it is done and the new one failed.

    Args:
        pattern: as of `fastar.results.load`.
        target: folder; made if need be.
        timings: False leaves out what clocks measured, as is right for runs that shared a machine.
        curves: False keeps one value of a clip in place of one a chunk: the mean, as tables have it, or, of what the
            cache holds, the last chunk's.

    Raises:
        ValueError: no runs are there, one is damaged, or none of them has come to an end.
    """
    copies = []
    for run, summary in find_runs(pattern):
        if summary["status"] not in ("done", "failed"):
            continue
        copy = target / summary["run_id"]
        copies.append(copy)
        kept = read_summary(copy)
        if copy.resolve() == run.resolve() or (
            kept and (kept["status"], summary["status"]) == ("done", "failed")
        ):
            continue
        copy.mkdir(parents=True, exist_ok=True)
        for name in (PROMPT, TABLE, SUMMARY):  # the summary last: it says that the table is complete
            if (run / name).exists():
                with atomic(copy / name) as part:
                    if name == TABLE and not (timings and curves):
                        write_table(_leaner(pq.read_table(run / name), timings, curves), part)
                    elif name == SUMMARY:  # hundreds of them: without white space they take two thirds
                        part.write_text(json.dumps(summary, separators=(",", ":")) + "\n")
                    else:
                        shutil.copyfile(run / name, part)
    if not copies:
        raise ValueError(f"no run in {pattern} has finished: nothing to record")
    return list(dict.fromkeys(copies))


def _leaner(table: pa.Table, timings: bool, curves: bool) -> pa.Table:
    rows = to_pandas(table)
    if not timings:
        rows = rows[~rows["metric"].map(is_timing)]
    if not curves:
        held = rows["metric"].map(is_held)
        last = rows["chunk"] == rows.groupby("metric")["chunk"].transform("max")
        of_chunks = rows["chunk"].notna()
        keys = ["metric", "clip", "unit"]
        means = rows[of_chunks & ~held].groupby(keys, sort=False, dropna=False)[["value", "time"]]
        rows = pd.concat([rows[~of_chunks], rows[held & last], means.mean().reset_index()])
    return pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False).replace_schema_metadata()
