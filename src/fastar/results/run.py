"""One run folder: what is written to it, when, and what is left of it after a crash. See `fastar.results.store`."""

import errno
import json
import os
import pickle
import shutil
import struct
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

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
from fastar.results.launch import launch_id
from fastar.results.lock import RunLock, RunLocked
from fastar.results.logtail import RunLog, last_lines, reason_of, sentence_of, unwrapped, without_paths
from fastar.results.rows import to_table, write_table
from fastar.results.sinks import Sink


def launches_of(summary: Mapping[str, Any]) -> list[str]:
    """Launches that have worked on a run; the first records had the last one only."""
    return list(summary.get("launches") or [summary[name] for name in ("launch",) if name in summary])


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
            if any((folder / left).exists() for left in (ROWS, STATE)):
                self._tidy_alone()
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
        return self._force and launch_id() not in launches_of(earlier)

    def _begin(self, summary: dict[str, Any]) -> None:
        earlier = read_summary(self.folder)  # again, now that nobody else can write it
        if earlier is not None and self._is_over(earlier):
            self.summary, self.finished = earlier, True
            self._lock.release()
            return
        if earlier is None or self._is_to_be_redone(earlier):
            self._clear()  # no summary: what else is there belongs to a run that somebody began to remove
            summary, earlier = {**summary, "launches": launches_of(earlier or {}) + summary["launches"]}, None
        for left in self.folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.resumed = earlier is not None
        if earlier is not None:
            launches = list(dict.fromkeys(launches_of(earlier) + summary["launches"]))
            summary = {**summary, "starts": int(earlier["starts"]) + 1, "launches": launches}
        self.summary = summary
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
                path.unlink(missing_ok=True)

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
            frame: index of the chunk's first latent frame.
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
        """What `save_state` kept last.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except (EOFError, KeyError, RuntimeError, struct.error, pickle.UnpicklingError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{path} is damaged ({sentence_of(error)}): remove the folder to run it again"
            ) from error
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
        if not (self.folder / ROWS).exists():
            raise RuntimeError(f"{self.folder / ROWS} was removed while the run was working: run it again")
        with self._writing(), atomic(self.folder / TABLE) as part:
            write_table(to_table(self.rows()), part)
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

    def _tidy_alone(self) -> None:
        """`_tidy`, unless another process has begun to do the run again."""
        try:
            self._lock.acquire()
        except RunLocked:
            return
        try:
            self.summary = read_summary(self.folder) or self.summary
            self._tidy()
        finally:
            self._lock.release()

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
