"""Weights & Biases, at arm's length: a run never waits for it."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastar.results.sinks.base import Sink
from fastar.results.sinks.mirror import Mirror, Options
from fastar.results.sinks.worker import Worker

if TYPE_CHECKING:
    import pandas as pd

_workers: dict[int, Worker] = {}
_lock = threading.Lock()


def worker() -> Worker:
    """This process's; a forked child, which does not inherit threads, gets its own."""
    with _lock:
        if os.getpid() not in _workers:
            _workers.clear()
            _workers[os.getpid()] = Worker()
        return _workers[os.getpid()]


class WandbSink(Sink):
    """Weights & Biases; offline unless told otherwise.

    Every call returns at once: what is logged is appended to a queue, and one background thread of the process imports
    wandb, writes an offline run below `<run folder>/wandb` and closes it, while the next run goes on. At the end of the
    process there is a wait of at most `flush_seconds`. Online means that a child process sends these files to the
    server while they are written. So nothing that the server does reaches a run, and all of it is on disk for
    `wandb sync <run folder>/wandb/offline-run-*`, whether the server could be reached or not.

    A problem is one warning in the log, a line in `<run folder>/wandb/problem.txt` and, if it comes before the run
    ends, a warning in its summary.json. Paths, host name and code are not sent.

    What W&B shows of a run: config, labels and seed; its numbers per chunk against `frame`, with the mean over clips
    beside each clip's own (`psnr`, `psnr/clip0`); in the summary those of the whole run, and means over chunks
    (`psnr/mean`). Runs are grouped by experiment, their job type is the method, protocol and backbone are tags.

    Args:
        mode: offline, online or disabled.
        project, entity: as in `wandb.init`.
        tags: besides protocol and backbone.
        group: None for the experiment's name.
        init_timeout: seconds the server has to answer in online mode.
        flush_seconds: longest wait at the end of the process.
    """

    def __init__(
        self,
        *,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "fastar",
        entity: str | None = None,
        tags: tuple[str, ...] = (),
        group: str | None = None,
        init_timeout: float = 30.0,
        flush_seconds: float = 5.0,
    ) -> None:
        if mode not in ("offline", "online", "disabled"):
            raise ValueError(f"logger.mode={mode} is none of offline, online, disabled")
        self.mode = mode
        self.options = Options(mode, project, entity, tuple(tags), group, init_timeout, flush_seconds)
        self._mirror: Mirror | None = None
        self._put: Callable[..., None] | None = None

    @property
    def problem(self) -> str | None:
        return None if self._mirror is None else self._mirror.problem

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self._mirror = Mirror(self.options, Path(folder), summary)
        self._put = worker().adopt(self._mirror)
        self._put("begin")

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        self._send("scalars", {name: float(value) for name, value in values.items()}, chunk, frame, clip)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        self._send("table", name, table)

    def image(self, name: str, path: Path) -> None:
        """A picture file, which has to stay until the end of the process; so in `video`."""
        self._send("image", name, Path(path))

    def video(self, name: str, path: Path) -> None:
        self._send("video", name, Path(path))

    def finish(self, status: str) -> None:
        """The run is over for its process; its last numbers may still be on their way."""
        if self._put is not None:
            self._put("finish", status)
            self._put = None

    def _send(self, call: str, *arguments: Any) -> None:
        if self._put is not None and self._mirror is not None and not self._mirror.broken:
            self._put(call, *arguments)
