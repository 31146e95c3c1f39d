"""What of a sweep is done, running, failed or missing, and which command does the rest."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastar.results.failures import bury
from fastar.results.files import read_summary
from fastar.results.lock import RunLock, RunLocked, is_stale
from fastar.sweep.records import JobRecord, read_records

STATES = ("done", "running", "waiting", "failed", "missing")
"""Of a run. waiting: interrupted and saved, some process will go on with it. missing: not begun."""
RUN_LABELS = ("run_id", "seeds", "protocol", "backbone", "method")


@dataclass
class Survey:
    """State of a sweep.

    Attributes:
        jobs: records, with the state of each: as of runs; a job is done if all of its runs are.
        runs: of every planned run its labels, state and, if failed, reason; runs that jobs share appear once.
    """

    jobs: list[tuple[JobRecord, str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def unfinished(self) -> list[JobRecord]:
        """Jobs that nobody works on and that are not done."""
        return [record for record, state in self.jobs if state not in ("done", "running")]

    def counts(self) -> Counter[str]:
        """Runs by state."""
        return Counter(run["state"] for run in self.runs)


def survey(experiment: Path, *, jobs: Sequence[str] = (), asked: Sequence[JobRecord] = ()) -> Survey:
    """Look at every job and run below an experiment's folder, or at `jobs` by key alone; the dead are buried first.

    Jobs in `asked` that nothing is known of are missing.

    Raises:
        ValueError: there are no jobs.
    """
    bury_dead(experiment)
    records = [record for record in read_records(experiment) if not jobs or record.key in jobs]
    known = {record.key for record in records}
    records += {record.key: record for record in asked if record.key not in known}.values()
    records.sort(key=lambda record: natural(" ".join(record.overrides)))
    if not records:
        raise ValueError(
            f"no jobs are recorded in {experiment}: give the folder of a sweep, as in outputs/frontier"
        )
    found, runs = Survey(), {}
    for record in records:
        for run in record.runs:
            if run["run_id"] not in runs:
                runs[run["run_id"]] = {**run, **state_of_run(experiment / run["run_id"])}
        states = {runs[run["run_id"]]["state"] for run in record.runs}
        found.jobs.append((record, state_of_job(record, states)))
    found.runs = list(runs.values())
    return found


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts numbers within texts by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def state_of_run(folder: Path) -> dict[str, Any]:
    """state, and reason if it failed; readable, False, if what is there is damaged."""
    try:
        summary = read_summary(folder)
    except ValueError as error:
        return {"state": "failed", "reason": str(error), "readable": False}
    if summary is None:
        return {"state": "missing"}
    if summary["status"] == "running":
        return {"state": "running" if is_held(folder) else "waiting"}
    return {"state": summary["status"], "reason": (summary.get("failure") or {}).get("reason")}


def state_of_job(record: JobRecord, states: set[str]) -> str:
    """A job's state from its record and those of its runs."""
    if is_held(record.folder):
        return "running"
    all_done = bool(record.runs) and states == {"done"}
    was_killed = (record.failure or {}).get("kind") == "killed"
    if (record.status == "failed" and not (all_done and was_killed)) or "failed" in states:
        return "failed"
    # a job that has still to begin may plan other runs than it did
    if all_done and record.status != "waiting":
        return "done"
    return "missing" if record.status == "waiting" and not record.runs else "waiting"


def is_held(folder: Path) -> bool:
    """Whether a process that may be alive works there."""
    holder = RunLock(folder).holder()
    return holder is not None and not is_stale(holder)


def bury_dead(experiment: Path) -> list[Path]:
    """Note runs and jobs whose process has ended without a word as failed; the folders of these runs."""
    locked = [path.parent for path in experiment.glob("*/lock")]
    buried = [folder for folder in locked if not is_held(folder) and bury(folder)]
    for record in read_records(experiment):
        lock = RunLock(record.folder)
        holder = lock.holder()
        if record.status == "running" and holder is not None and is_stale(holder):
            try:
                lock.acquire()
            except RunLocked:  # somebody else was faster
                continue
            try:
                record.status = "failed"
                job = f" (Slurm job {record.slurm_job})" if record.slurm_job else ""
                record.failure = {"kind": "killed", "reason": f"its process ended without a word{job}"}
                record.save()
            finally:
                lock.release()
    return buried


def rerun_commands(records: Sequence[JobRecord]) -> list[str]:
    """Commands that do these jobs: multiruns where jobs differ in one override, else one command a job."""
    commands = []
    where = {place for record in records for place in place_of(record)}
    for program in dict.fromkeys(record.program for record in records):
        rest = [tuple(record.overrides) for record in records if record.program == program]
        while rest:
            chosen, fixed, swept = widest(rest)
            rest = [overrides for overrides in rest if overrides not in chosen]
            flag = ["-m"] if swept else []
            commands.append(shlex.join(["python", f"experiments/{program}", *flag, *fixed, *swept, *where]))
    return commands


def place_of(record: JobRecord) -> list[str]:
    """The override that says where a job's runs are, unless that is where they are by default."""
    outputs = record.folder.parents[2]  # <outputs>/<experiment>/jobs/<key>
    return [] if outputs.resolve() == Path("outputs").resolve() else [f"paths.outputs={quoted(outputs)}"]


def quoted(path: Path) -> str:
    """A path as the value of an override."""
    text = str(path)
    return text if re.fullmatch(r"[\w/.+-]+", text, re.ASCII) else "'" + text.replace("'", "\\'") + "'"


def widest(jobs: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """The most jobs that one command can do, with the overrides that they share and the one that is swept."""
    best: tuple[list[tuple[str, ...]], list[str], list[str]] = ([jobs[0]], list(jobs[0]), [])
    for position in (place for place, override in enumerate(jobs[0]) if "=" in override):
        fixed = [override for number, override in enumerate(jobs[0]) if number != position]
        name = jobs[0][position].split("=")[0]
        same = [
            job for job in jobs
            if len(job) == len(jobs[0]) and job[position].split("=")[0] == name
            and [override for number, override in enumerate(job) if number != position] == fixed
        ]  # fmt: skip
        values = [job[position].split("=", 1)[1] for job in same]
        if len(same) > len(best[0]):
            best = (same, fixed, [f"{name}={','.join(values)}"])
    return best


def count_rows(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a table: one row a protocol and method, with its settings, and how many runs are in which state."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        settings = {k: v for k, v in run.items() if k not in (*RUN_LABELS, "state", "reason", "readable")}
        name = " ".join([run["method"], *(f"{key}={value}" for key, value in settings.items())])
        row = rows.setdefault(
            (run["protocol"], name), {"protocol": run["protocol"], "method": name} | dict.fromkeys(STATES, 0)
        )
        row[run["state"]] += 1
    return [rows[key] for key in sorted(rows)]
