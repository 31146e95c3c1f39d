"""What a job of a sweep has to do and what came of it: `<outputs>/<experiment>/jobs/<key>/job.json`.

A job is one point of a Hydra multirun, or a command given by itself. Its record names the overrides that make it, so
that it can be run again, and the runs that it is to produce, so that what is missing is known. What has become of a
run is said by the run itself, never here.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from fastar.results.files import atomic
from fastar.results.lock import RunLock, RunLocked
from fastar.results.logtail import reason_of, unwrapped

JOBS, RECORD = "jobs", "job.json"
WHERE_AND_HOW = ("paths", "launcher", "logger", "hydra", "force", "retry_failed")
"""Overrides that say where or how a job runs, not what it is."""


@dataclass
class JobRecord:
    """One job.

    Attributes:
        folder: of this record.
        program: file name of the entry point.
        overrides: as on the command line, those that say where and how left out.
        status: waiting, running, interrupted (saved, to go on), done or failed.
        runs: of each run its run_id, seeds and labels; empty until the job has begun.
        failure: kind and reason, if an error outside of its runs ended the job.
        changed: UTC time of the last change.
        slurm_job: the last Slurm job that worked on it.
    """

    folder: Path
    program: str
    overrides: list[str]
    status: str = "waiting"
    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, str] | None = None
    changed: str = ""
    slurm_job: str | None = None

    @property
    def key(self) -> str:
        """Names the job."""
        return self.folder.name

    def save(self) -> None:
        """Write the record."""
        self.changed = datetime.now(UTC).isoformat(timespec="seconds")
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = {name: value for name, value in asdict(self).items() if name != "folder"}
        with atomic(self.folder / RECORD, shared=True) as part:
            part.write_text(json.dumps(plain, indent=1) + "\n")

    def plan(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Note the runs that the job is to produce."""
        self.runs = [dict(run) for run in runs]
        self.save()

    def fail(self, error: BaseException) -> None:
        """Note what ended the job."""
        self.failure = {"kind": type(unwrapped(error)).__name__, "reason": reason_of(error)}


def job_key(overrides: Sequence[str]) -> str:
    """Ten hexadecimal digits for what a job is, whatever the order of its overrides."""
    return hashlib.sha256("\n".join(sorted(essential(overrides))).encode()).hexdigest()[:10]


def essential(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what a job is, spelt as Hydra does: `[a,b]` for `[a, b]`, `0.1` for `0.10`."""

    def group(override: str) -> str:
        return override.lstrip("+~").split("=")[0].split(".")[0].split("@")[0].split("/")[0]

    chosen = [override for override in overrides if group(override) not in WHERE_AND_HOW]
    parsed = OverridesParser.create().parse_overrides(chosen)
    return [respelt(override) for override in parsed]


def respelt(override: Override) -> str:
    """An override as Hydra's sweeper writes it."""
    if override.is_delete() and override.value() is None:
        return override.get_key_element()
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def record_of(experiment: Path, program: str, overrides: Sequence[str]) -> JobRecord:
    """The record of a job below an experiment's folder: the one that is there, or a new one, not written yet."""
    folder = experiment / JOBS / job_key(overrides)
    return read_record(folder) or JobRecord(folder, program, essential(overrides))


def read_record(folder: Path) -> JobRecord | None:
    """A record, or None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    try:
        return JobRecord(folder, **json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record of a job ({error}): remove it, the runs do not need it"
        ) from error


def read_records(experiment: Path) -> Iterator[JobRecord]:
    """All records below an experiment's folder, by key."""
    for path in sorted((experiment / JOBS).glob(f"*/{RECORD}")):
        record = read_record(path.parent)
        if record is not None:
            yield record


def read_sweep_file(path: Path, experiment: Path) -> list[JobRecord]:
    """The jobs of a sweep file of slurm/compare_array.sbatch: their records in `experiment`, or new ones.

    Raises:
        ValueError: a line is no list of overrides.
        FileNotFoundError: there is no such file.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            overrides = shlex.split(line)
            records += [record_of(experiment, "compare.py", overrides)] if overrides else []
        except (ValueError, OverrideParseException) as error:
            raise ValueError(f"line {number} of {path} cannot be read: {error}") from error
    return records


def forget_waiting(experiment: Path, jobs: Iterable[Sequence[str]]) -> None:
    """Remove the records of jobs (overrides) that have never begun, because Slurm refused them, say."""
    for overrides in jobs:
        record = read_record(experiment / JOBS / job_key(overrides))
        if record is not None and record.status == "waiting" and not record.runs:
            shutil.rmtree(record.folder)


def take(record: JobRecord, slurm_job: str | None) -> RunLock | None:
    """Begin to work on a job: its lock, or None if another process works on it, too (they share the runs)."""
    record.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(record.folder)
    try:
        lock.acquire()
    except RunLocked:
        return None
    record.status, record.failure, record.slurm_job = "running", None, slurm_job
    record.save()
    return lock
