"""Where runs live: `<root>/<experiment>/<run_id>/`, found, skipped or resumed, never silently overwritten.

    store = RunStore("outputs", "demo")
    with store.open(config, seed=0, checkpoint_sha256=sha, labels={"method": "tempcache"}) as run:
        if not run.finished:
            rollout.load_state_dict(run.load_state()) if run.has_state else ...
            for chunk in ...:
                run.log({"psnr": 31.2}, chunk=chunk, frame=4 * chunk)
                run.save_state(rollout.state_dict())

summary.json   status (running, done, failed), labels, seed, config, environment, failure
metrics.jsonl  rows as they are logged; metrics.parquet replaces it when the run is complete
state.pt       what `save_state` kept, until the run is complete
log.txt        what was logged meanwhile
lock           while a process works on the run
videos/, ...   whatever the experiment adds
"""

import errno
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig

from fastar import interruption
from fastar.metrics.names import unit_of
from fastar.results.failures import is_out_of_memory
from fastar.results.files import (
    ROWS,
    STATE,
    SUMMARY,
    TABLE,
    Unwritable,
    atomic,
    no_room,
    read_rows,
    read_summary,
    unwritable,
    write_json,
)
from fastar.results.identity import SCHEMA_VERSION, recorded_config, run_id
from fastar.results.launch import launch_id
from fastar.results.lock import RunLock
from fastar.results.logtail import RunLog, last_lines, reason_of, unwrapped, without_paths
from fastar.results.provenance import environment
from fastar.results.rows import to_table
from fastar.results.sinks import Sink

logger = logging.getLogger(__name__)


class RunStore:
    """The runs of one experiment.

    Args:
        root: folder of all outputs.
        experiment: name of the experiment, one folder below `root`.
        sinks: mirrors of every run that is worked on (W&B, CSV).
        force: do runs again that an earlier launch (see `fastar.results.launch`) has worked on, whatever came of them.
        retry_failed: False to leave a run that failed before as it is (`Run.finished` is then true).
    """

    def __init__(
        self,
        root: str | Path,
        experiment: str,
        *,
        sinks: Sequence[Sink] = (),
        force: bool = False,
        retry_failed: bool = True,
    ) -> None:
        self.folder = Path(root) / experiment
        self.experiment = experiment
        self.sinks = list(sinks)
        self.force, self.retry_failed = force, retry_failed

    def open(
        self,
        config: DictConfig | Mapping[str, Any],
        *,
        seed: int | Sequence[int],
        checkpoint_sha256: str | None = None,
        timing_device: str | None = None,
        labels: Mapping[str, str | int | float | bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Run":
        """The run with this identity (see `fastar.results.run_id`): new, to be resumed, or finished already.

        Args:
            labels: columns of every row of this run in the loaded table, such as method and protocol. They describe the
                config and are not part of the identity.
            device: recorded in the environment.

        Raises:
            RunLocked: another process is working on it.
            ValueError: the folder cannot be written, or holds a damaged run.
        """
        identifier = run_id(
            config, seed=seed, checkpoint_sha256=checkpoint_sha256, timing_device=timing_device
        )
        summary = {
            "schema_version": SCHEMA_VERSION,
            "run_id": identifier,
            "experiment": self.experiment,
            "status": "running",
            "labels": dict(labels or {}),
            "seed": list(seed) if isinstance(seed, Sequence) else seed,
            "checkpoint_sha256": checkpoint_sha256,
            "config": recorded_config(config),
            "environment": environment(device=device, seeds=[seed] if isinstance(seed, int) else seed),
            "starts": 1,
            "launch": launch_id(),
            "finished": None,
            "failure": None,
            "warnings": [],
        }
        over = ("done",) if self.retry_failed else ("done", "failed")
        return Run(self.folder / identifier, summary, sinks=self.sinks, over=over, force=self.force)


class Run:
    """One run folder, opened by `RunStore.open`; use it as a context manager.

    Leaving the context normally completes the run. An exception is recorded as the run's failure (reason and last log
    lines) and goes on to the caller. An interruption (Ctrl-C, a signal that raises SystemExit) leaves the run as
    `running`, to be resumed.

    Attributes:
        finished: nothing is left to do; the folder is not touched.
        resumed: an earlier process has worked on it.
    """

    def __init__(
        self,
        folder: Path,
        summary: dict[str, Any],
        *,
        sinks: Sequence[Sink],
        over: Sequence[str],
        force: bool = False,
    ) -> None:
        self.folder, self.run_id = folder, str(summary["run_id"])
        self.sinks = list(sinks)
        self.resumed = False
        self._lock = RunLock(folder)
        self._log = RunLog(folder)
        self._rows: TextIO | None = None
        self._over, self._force = tuple(over), force
        earlier = read_summary(folder)
        self.finished = earlier is not None and self._is_over(earlier)
        self.summary = summary if earlier is None else earlier
        if self.finished:
            self._tidy()
            return
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            with self._writing():
                self._begin(summary)
        except BaseException:
            self._lock.release()
            raise

    def _is_over(self, earlier: Mapping[str, Any]) -> bool:
        return earlier["status"] in self._over and not self._is_to_be_redone(earlier)

    def _is_to_be_redone(self, earlier: Mapping[str, Any]) -> bool:
        # What this launch has begun itself goes on, or a job that is requeued would start over for ever.
        return self._force and earlier.get("launch") != launch_id()

    def _begin(self, summary: dict[str, Any]) -> None:
        earlier = read_summary(self.folder)  # again, now that nobody else can write it
        if earlier is not None and self._is_over(earlier):
            self.summary, self.finished = earlier, True
            self._lock.release()
            return
        if earlier is not None and self._is_to_be_redone(earlier):
            self._clear()
            earlier = None
        for left in self.folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.resumed = earlier is not None
        self.summary = summary if earlier is None else {**summary, "starts": int(earlier["starts"]) + 1}
        rows = read_rows(self.folder / ROWS)
        with atomic(self.folder / ROWS) as part:  # without a line that was cut off
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._write_summary()
        self._rows = (self.folder / ROWS).open("a", buffering=1)
        self._log.attach()
        for sink in self.sinks:
            sink.start(self.folder, self.summary)

    def _clear(self) -> None:
        """Remove everything but the lock; the summary first: without it, nothing left is taken for a result."""
        (self.folder / SUMMARY).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lock.path:
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finished:
            return
        if error is None:
            self.complete()
        elif isinstance(error, Unwritable):
            with suppress(Unwritable):  # it is what goes on to the caller anyway
                self._close("interrupted")
        elif isinstance(error, Exception) and interruption.requested():
            self._close("interrupted")  # a child process has got the signal, too, and left its work undone
            interruption.check()
        elif isinstance(error, Exception) and no_room(self.folder, error):
            with suppress(Unwritable):
                self._close("interrupted")
            raise unwritable(self.folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        elif isinstance(error, Exception):
            self.fail(error)
        else:
            self._close("interrupted")

    def log(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
        unit: str | None = None,
    ) -> None:
        """Add one row per metric.

        Args:
            values: metric -> number. A later row replaces an earlier one of the same metric, chunk, frame and clip.
            chunk: index of the chunk, None for a value of the whole run.
            frame: index of the chunk's first pixel frame.
            clip: index in the batch, None for a value of all clips.
            unit: of all these values; by default the one in `fastar.metrics.names`.
        """
        file = self._open_rows()
        now = round(time.time(), 3)
        for metric, value in values.items():
            row = {
                "metric": metric,
                "chunk": chunk,
                "frame": frame,
                "clip": clip,
                "value": float(value),
                "unit": unit_of(metric) if unit is None else unit,
                "time": now,
            }
            with self._writing():
                file.write(json.dumps(row) + "\n")
        for sink in self.sinks:
            sink.scalars(values, chunk=chunk, frame=frame, clip=clip)

    def rows(self) -> list[dict[str, Any]]:
        """Rows logged so far, by this and earlier processes."""
        return read_rows(self.folder / ROWS)

    @property
    def has_state(self) -> bool:
        """Whether an interrupted process left a state to go on from."""
        return (self.folder / STATE).exists()

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, text and containers of them) for a resumed run; replaces an earlier one."""
        file = self._open_rows()
        with self._writing():
            os.fsync(file.fileno())  # rows that the state stands on must not be younger than it
            with atomic(self.folder / STATE) as part, part.open("wb") as written:
                torch.save(state, written)

    def load_state(self, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
        """What `save_state` kept last."""
        state: dict[str, Any] = torch.load(self.folder / STATE, map_location=map_location, weights_only=True)
        return state

    @property
    def videos(self) -> Path:
        """The folder for the run's videos; made on first use."""
        folder = self.folder / "videos"
        folder.mkdir(exist_ok=True)
        return folder

    def complete(self) -> None:
        """Turn the rows into metrics.parquet and mark the run as done."""
        self._open_rows().flush()
        with self._writing(), atomic(self.folder / TABLE) as part:
            pq.write_table(to_table(self.rows()), part)
        # From here on the table is complete; the status says so last, and only then is the working copy removed.
        self._close("done")
        self._tidy()
        self.finished = True

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed, with the error and the last log lines. Its rows are kept."""
        where = traceback.extract_tb(error.__traceback__)
        self.summary["failure"] = {
            "kind": "out of memory" if is_out_of_memory(error) else type(unwrapped(error)).__name__,
            "reason": reason_of(error),
            "where": f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else None,
            "log": last_lines(self.folder),
        }
        self._close("failed")

    def _tidy(self) -> None:
        """Remove the working copy of a complete run; a process may have been killed just before it did."""
        if self.summary["status"] == "done":
            for leftover in (ROWS, STATE):
                (self.folder / leftover).unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses is one sentence."""
        try:
            yield
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _close(self, status: str) -> None:
        try:
            if self._rows is not None:
                rows, self._rows = self._rows, None
                with self._writing():
                    rows.close()
            for sink in self.sinks:
                sink.finish(status)
                if sink.problem is not None:
                    self.summary["warnings"].append(without_paths(sink.problem))
            if status != "interrupted":
                self.summary["status"] = status
                self.summary["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
            self._write_summary()
        finally:
            self._log.detach()
            self._lock.release()

    def _write_summary(self) -> None:
        with self._writing():
            write_json(self.folder / SUMMARY, self.summary)

    def _open_rows(self) -> TextIO:
        if self._rows is None:
            raise RuntimeError(
                f"run {self.run_id} is closed ({self.summary['status']}): nothing can be logged to it"
            )
        return self._rows
