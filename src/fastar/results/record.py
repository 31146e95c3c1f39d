"""Runs that a table or figure rests on, copied to where they are kept: settings and numbers, no videos, no states."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from fastar.metrics.names import is_timing
from fastar.results.files import PROMPT, SUMMARY, TABLE, atomic, read_summary
from fastar.results.loading import find_runs
from fastar.results.rows import write_table


def record_runs(
    pattern: str | Path | Sequence[str | Path], target: Path, *, timings: bool = True
) -> list[Path]:
    """Copy every finished or failed run that `pattern` names to `target`/<run id>; returns the copies.

    A run that is there already is replaced, unless it is done and the new one failed.

    Args:
        pattern: as of `fastar.results.load`.
        target: folder; made if need be.
        timings: False leaves out what clocks measured, as is right for runs that shared a machine.

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
                    if name == TABLE and not timings:
                        _copy_untimed(run / name, part)
                    else:
                        shutil.copyfile(run / name, part)
    if not copies:
        raise ValueError(f"no run in {pattern} has finished: nothing to record")
    return list(dict.fromkeys(copies))


def _copy_untimed(table: Path, copy: Path) -> None:
    rows = pq.read_table(table)
    kept = [not is_timing(metric) for metric in rows["metric"].to_pylist()]
    write_table(rows.filter(kept), copy)
