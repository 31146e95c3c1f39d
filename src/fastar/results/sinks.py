"""Mirrors of a run in other places. The store is the truth; a sink that breaks never stops a run."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import pandas as pd
import wandb

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """What a run, and an experiment as a whole, tells the outside. One sink serves several runs, one after another.

    Attributes:
        problem: why the sink stopped working in the current run, None while it works.
    """

    problem: str | None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """A run begins in `folder`; `summary` is its summary.json."""

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        """Numbers of one chunk, or of the whole run if `chunk` is None."""

    def table(self, name: str, table: pd.DataFrame) -> None:
        """A finished table."""

    def image(self, name: str, path: Path) -> None:
        """A picture file."""

    def video(self, name: str, path: Path) -> None:
        """An MP4 file."""

    def finish(self, status: str) -> None:
        """The run ends as done, failed or interrupted."""


class NullSink:
    """Mirrors nothing."""

    problem: str | None = None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None: ...

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None: ...

    def table(self, name: str, table: pd.DataFrame) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def video(self, name: str, path: Path) -> None: ...

    def finish(self, status: str) -> None: ...


class CsvSink(NullSink):
    """Files in the run's folder: `scalars.csv` (metric, chunk, frame, clip, value) and one per table."""

    def __init__(self) -> None:
        self.problem = None
        self._folder: Path | None = None
        self._file: TextIO | None = None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self.problem, self._folder = None, folder
        path = folder / "scalars.csv"
        new = not path.exists()  # a resumed run goes on in its file
        self._file = path.open("a", newline="", buffering=1)
        if new:
            csv.writer(self._file).writerow(["metric", "chunk", "frame", "clip", "value"])

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        if self._file is not None:
            csv.writer(self._file).writerows(
                [name, chunk, frame, clip, value] for name, value in values.items()
            )

    def table(self, name: str, table: pd.DataFrame) -> None:
        if self._folder is not None:
            table.to_csv(self._folder / f"{name}.csv", index=False)

    def finish(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class WandbSink:
    """Weights & Biases; offline unless told otherwise (`wandb sync <run folder>/wandb/offline-run-*` uploads later).

    A W&B error is logged as one warning and kept in `problem`; from then on this run is no longer mirrored. Paths, host
    name and code are not sent.

    Args:
        mode: offline, online or disabled.
        project, entity, tags: as in `wandb.init`.
        init_timeout: seconds to wait for the server in online mode.
    """

    def __init__(
        self,
        *,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "fastar",
        entity: str | None = None,
        tags: tuple[str, ...] = (),
        init_timeout: float = 30.0,
    ) -> None:
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tuple(tags)
        self.init_timeout = init_timeout
        self.problem: str | None = None
        self._run: wandb.Run | None = None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self.problem = None
        labels = summary.get("labels", {})
        settings = wandb.Settings(
            init_timeout=self.init_timeout, silent=True, console="off", save_code=False, disable_git=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, host="hidden",
        )  # fmt: skip
        try:
            self._run = wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                tags=self.tags,
                id=summary["run_id"],
                name=" ".join([*(str(value) for value in labels.values()), str(summary["run_id"])]),
                group=summary.get("experiment"),
                config={"seed": summary.get("seed"), **labels, **summary.get("config", {})},
                dir=folder,
                resume="allow"
                if self.mode == "online"
                else None,  # offline runs are joined when they are uploaded
                reinit="create_new",
                settings=settings,
            )
            self._run.define_metric("*", step_metric="frame")
        except wandb.Error as error:
            self._give_up(error)

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        names = {name if clip is None else f"{name}/clip{clip}": value for name, value in values.items()}
        if chunk is None:
            self._summarise(names)
        else:
            self._log({**names, "chunk": chunk, "frame": chunk if frame is None else frame})

    def table(self, name: str, table: pd.DataFrame) -> None:
        self._log({name: wandb.Table(dataframe=table)})

    def image(self, name: str, path: Path) -> None:
        self._log({name: wandb.Image(str(path))})

    def video(self, name: str, path: Path) -> None:
        self._log({name: wandb.Video(str(path), format="mp4")})

    def finish(self, status: str) -> None:
        self._summarise({"status": status})
        if self._run is not None:
            try:
                self._run.finish(exit_code=0 if status == "done" else 1)
            except wandb.Error as error:
                self._give_up(error)
            self._run = None

    def _log(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.log(record)
            except wandb.Error as error:
                self._give_up(error)

    def _summarise(self, record: Mapping[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.summary.update(dict(record))
            except wandb.Error as error:
                self._give_up(error)

    def _give_up(self, error: wandb.Error) -> None:
        self.problem = f"W&B: {type(error).__name__}: {error}"
        self._run = None
        logger.warning("%s; this run goes on without W&B", self.problem)
