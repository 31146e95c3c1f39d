"""From run folders to one tidy table. Every table and figure starts here."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fastar.results.archive import ARCHIVE, unpack
from fastar.results.files import ROWS, SUMMARY, TABLE, read_rows, read_summary
from fastar.results.rows import SCHEMA, to_pandas, to_table

FAILURE = "failure"
"""Metric of the one row that stands for a failed run; its value is NaN and its `reason` says why."""


RESERVED = (*SCHEMA.names, "experiment", "run_id", "run", "status", "seed", "kind", "reason", "where", "time", "device",
            "commit", "dirty", "folder")  # fmt: skip
"""Columns that `load` and `load_runs` make: no label may have their name."""


def load(
    pattern: str | Path | Sequence[str | Path] = "outputs/**",
    *,
    config: Iterable[str] = (),
    partial: bool = False,
) -> pd.DataFrame:
    """All rows of all complete runs below `pattern`, and one row for each failed run.

    Columns:
        experiment, run_id: text. status: done, failed or running.
        seed: int, or a tuple of ints if the run had several.
        one column per label of the runs (method, protocol, ...), missing where a run lacks it.
        one column per dotted path in `config`.
        metric, unit: text. chunk, frame, clip: Int64, missing where a value is of the whole run or of all clips.
        value: float64, in `unit`. time: Unix seconds of logging.
        reason: why a failed run failed, else missing.

    Args:
        pattern: folder or glob, or several; `**` matches any depth.
        config: dotted paths into the recorded config, such as `cache.budget_frames`.
        partial: also the rows of running and failed runs; `status` tells them apart.

    Raises:
        ValueError: no runs are there, one is damaged or there twice, or they are of several schema versions.
    """
    runs, parts = find_runs(pattern), []
    _check_unique(runs)
    wanted = list(config)
    for number, (folder, summary) in enumerate(runs):
        table = rows_of(folder, summary, partial=partial)
        parts.append(table.append_column("run", pa.array([number] * len(table), pa.int64())))
    rows = to_pandas(pa.concat_tables(parts))
    described = pd.DataFrame([_describe(summary, wanted) for _, summary in runs])
    described["reason"] = pd.array(
        [(summary.get("failure") or {}).get("reason") for _, summary in runs], dtype="str"
    )
    columns = [*(name for name in described.columns if name != "reason"), *SCHEMA.names, "reason"]
    return rows.join(described, on="run")[columns]


def load_runs(
    pattern: str | Path | Sequence[str | Path] = "outputs/**", *, config: Iterable[str] = ()
) -> pd.DataFrame:
    """One row per run: what `load` has per run, then failure, time, device and git state."""
    wanted, records = list(config), []
    runs = find_runs(pattern)
    _check_unique(runs)
    for folder, summary in runs:
        failure, made_with = summary.get("failure") or {}, summary.get("environment") or {}
        records.append(
            {
                **_describe(summary, wanted),
                **{key: failure.get(key) for key in ("kind", "reason", "where")},
                "time": made_with.get("time"),
                "device": made_with.get("device"),
                "commit": (made_with.get("git") or {}).get("commit"),
                "dirty": (made_with.get("git") or {}).get("dirty"),
                "folder": str(folder),
            }
        )
    return pd.DataFrame(records)


def find_runs(pattern: str | Path | Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and summary of every run that `pattern` names, as `load` takes it, in the order of their folders.

    Recorded runs that are packed (`fastar.results.archive`) are unpacked first.

    Raises:
        ValueError: no runs are there, one is damaged, or an archive is.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    folders: set[Path] = set()
    for each in patterns:
        place = glob.escape(str(each)) if Path(each).is_dir() else each  # a folder may be called a[1]
        for archive in _archives(str(place)):
            unpack(archive.parent)
        files = glob.glob(f"{place}/{SUMMARY}", recursive=True) or glob.glob(
            f"{place}/**/{SUMMARY}", recursive=True
        )
        folders |= {Path(file).parent for file in files}
    # links lead to the same run
    once = {folder.resolve(): folder for folder in sorted(folders, reverse=True)}
    found = [
        (folder, summary) for folder in sorted(once.values()) if (summary := read_summary(folder)) is not None
    ]
    if not found:
        raise ValueError(
            f"no runs match {', '.join(map(str, patterns))}: give the folder of an experiment or a glob of it"
        )
    return found


def _archives(place: str) -> set[Path]:
    """Archives in, below and directly above the folders that `place`, a glob, stands for: a run may be named itself."""
    above = str(Path(place).parent)
    return {
        Path(file)
        for pattern in (f"{place}/**/{ARCHIVE}", f"{place}/{ARCHIVE}", f"{above}/{ARCHIVE}")
        for file in glob.glob(pattern, recursive=True)
    }


def _check_unique(found: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Raise a ValueError if a run is there twice, as in a copied folder, or if versions of the store are mixed."""
    seen: dict[tuple[Any, ...], Path] = {}
    versions = {}
    for folder, summary in found:
        key = (summary.get("experiment"), summary["run_id"])
        if key in seen:
            raise ValueError(f"{folder} is the same run as {seen[key]} (a copy?): leave one of them out")
        seen[key] = folder
        versions[summary.get("schema_version")] = folder
    if len(versions) > 1:
        places = ", ".join(f"{version} in {folder}" for version, folder in versions.items())
        raise ValueError(f"runs of several schema versions cannot be read together ({places}): name one kind")


def _describe(summary: dict[str, Any], config: Iterable[str]) -> dict[str, Any]:
    seed = summary.get("seed")
    return {
        "experiment": summary.get("experiment"),
        "run_id": summary["run_id"],
        "status": summary["status"],
        "seed": tuple(seed) if isinstance(seed, list) else seed,
        **summary.get("labels", {}),
        **{path: _at(summary.get("config", {}), path) for path in config},
    }


def _at(config: Any, path: str) -> Any:
    """Value at a dotted path, None if there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def rows_of(folder: Path, summary: dict[str, Any], *, partial: bool) -> pa.Table:
    """Rows of one run, and one that stands for its failure; none of an unfinished one unless `partial`."""
    status = summary["status"]
    if status == "done":
        if not (folder / TABLE).exists():
            raise ValueError(
                f"{folder} is marked as done but has no {TABLE}: remove the folder to run it again"
            )
        # small files, many of them: threads and read-ahead would cost more than they save
        try:
            with pq.ParquetFile(folder / TABLE) as table:
                return table.read(use_threads=False).cast(SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{folder / TABLE} is damaged ({error}): remove the folder to run it again"
            ) from error
    rows = read_rows(folder / ROWS) if partial else []
    if status == "failed":
        rows.append(dict.fromkeys(SCHEMA.names) | {"metric": FAILURE, "value": float("nan"), "unit": ""})
    return to_table(rows)
