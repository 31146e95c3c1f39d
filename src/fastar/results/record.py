"""Runs that a table or figure rests on, copied to where they are kept: settings, numbers, perhaps some frames."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fastar.metrics.names import is_held, is_timing
from fastar.results.archive import pack, unpack
from fastar.results.files import PROMPT, SUMMARY, TABLE, atomic, read_summary, write_json
from fastar.results.identity import run_id
from fastar.results.loading import find_runs
from fastar.results.rows import SCHEMA, to_pandas, write_table
from fastar.results.stills import write_stills


def record_runs(
    pattern: str | Path | Sequence[str | Path],
    target: Path,
    *,
    timings: bool = True,
    curves: bool = True,
    together: bool = False,
    stills: int = 0,
    still_height: int = 48,
) -> list[Path]:
    """Copy every finished or failed run that `pattern` names to `target`/<run id>; returns the copies.

    A run that is there already is replaced, unless it is done and the new one failed. All runs that `target` then holds
    go into `target`/runs.tar.xz (`fastar.results.archive`), which is what to keep.

    Args:
        pattern: as of `fastar.results.load`.
        target: folder; made if need be.
        timings: False leaves out what clocks measured, as is right for runs that shared a machine.
        curves: False keeps one value of a clip in place of one a chunk: the mean, as tables have it, or, of what the
            cache holds, the last chunk's.
        together: True makes one run of all that differ in their one seed alone, as if it had made their clips: less to
            keep. It is named by its seeds, and says the environment of the first.
        stills: how many frames of the first video that a run kept go with it, of `still_height` lines or somewhat more
            (`fastar.results.stills`).

    Raises:
        ValueError: no runs are there, one is damaged, or none of them has come to an end.
    """
    unpack(target)
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
        if stills:
            write_stills(run, copy, stills, still_height)
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
    copies = list(dict.fromkeys(copies))
    if together:
        copies = _joined(copies, target)
    pack(target, [run for run in target.iterdir() if (run / SUMMARY).exists()])
    return copies


def _joined(runs: Sequence[Path], target: Path) -> list[Path]:
    """Folders of `runs`, those of single seeds replaced by one for each group that has all else in common."""
    groups: dict[str, list[tuple[int, Path, dict[str, Any]]]] = {}
    kept = []
    for run in runs:
        summary = read_summary(run)
        assert summary is not None
        if summary["status"] == "done" and isinstance(summary["seed"], int):
            same = [summary[name] for name in ("config", "labels", "checkpoint_sha256")]
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((summary["seed"], run, summary))
        else:
            kept.append(run)
    for group in groups.values():
        group.sort(key=lambda member: member[0])
        seeds = [seed for seed, _, _ in group]
        summary = group[0][2]
        name = run_id(summary["config"], seed=seeds, checkpoint_sha256=summary["checkpoint_sha256"])
        tables = [to_pandas(pq.read_table(run / TABLE)).assign(clip=n) for n, (_, run, _) in enumerate(group)]
        environment = {**summary["environment"], "seeds": seeds}
        (target / name).mkdir(exist_ok=True)
        with atomic(target / name / TABLE) as part:
            write_table(_as_table(pd.concat(tables).astype({"clip": "Int64"})), part)
        write_json(
            target / name / SUMMARY, {**summary, "run_id": name, "seed": seeds, "environment": environment}
        )
        kept.append(target / name)
        for _, run, _ in group:
            shutil.rmtree(run)
    return kept


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
    return _as_table(rows)


def _as_table(rows: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False).replace_schema_metadata()
