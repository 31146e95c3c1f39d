"""One run as W&B sees it. All methods but `give_up` run in the worker's thread."""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastar.results.sinks.uploader import Uploader

if TYPE_CHECKING:
    import pandas as pd
    import wandb

logger = logging.getLogger(__name__)

PROBLEM = "problem.txt"


@dataclass(frozen=True)
class Options:
    """Arguments of `WandbSink`."""

    mode: str
    project: str
    entity: str | None
    tags: tuple[str, ...]
    group: str | None
    init_timeout: float
    flush_seconds: float


class Mirror:
    """Writes an offline run; in online mode an uploader follows it.

    Attributes:
        problem: what went wrong first, or None.
        broken: nothing more is mirrored; not so if only the upload failed.
        uploader: who sends it.
    """

    def __init__(self, options: Options, folder: Path, summary: Mapping[str, Any]) -> None:
        labels = {key: value for key, value in summary.get("labels", {}).items() if value is not None}
        self.options, self.folder = options, folder
        self.problem: str | None = None
        self.broken = self._closed = self._answered = False
        self.uploader: Uploader | None = None
        self._run: wandb.Run | None = None
        self._whole = summary.get("starts", 1) == 1  # else an earlier process has seen some chunks
        self._line: dict[str, Any] = {}
        self._clips: dict[str, list[float]] = {}
        self._place: tuple[int | None, int | None] = (None, None)
        self._sums: dict[str, tuple[float, int]] = {}
        tags = [*options.tags, *(_tag(key, labels[key]) for key in ("protocol", "backbone") if key in labels)]
        self._init: dict[str, Any] = {
            "project": options.project,
            "entity": options.entity,
            "tags": tags,
            "id": str(summary["run_id"]),
            "name": " ".join([*(str(value) for value in labels.values()), str(summary["run_id"])]),
            "group": options.group or summary.get("experiment"),
            "job_type": labels.get("method"),
            "config": {"seed": summary.get("seed"), **labels, **summary.get("config", {})},
        }

    @property
    def over(self) -> bool:
        """Whether nothing is left to do: closed, and in online mode sent; or broken."""
        return self.broken or (self._closed and (self.uploader is None or self._answered))

    def call(self, name: str, *arguments: Any) -> None:
        """Do what was put into the queue; whatever goes wrong is this mirror's problem alone."""
        if self.broken and name != "finish":
            return
        try:
            getattr(self, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - wandb raises more than wandb.Error; no run may end by it
            self.give_up(f"{type(error).__name__}: {error}")

    def give_up(self, problem: str) -> None:
        """Mirror no more."""
        if not self.broken:
            self.broken = True
            self._note(problem, f"run {self._init['id']} goes on without W&B")

    def sent(self, problem: str | None) -> None:
        """The uploader is done, or cannot do it; the offline run is there all the same."""
        self._answered = True
        if problem is not None:
            self._note(problem, f"the run is kept offline: `wandb sync {self.folder}/wandb/offline-run-*`")

    def begin(self) -> None:
        import wandb

        logging.getLogger("wandb").propagate = False  # it tells its steps to a debug.log of its own
        options = self.options
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True,
            x_disable_machine_info=True, x_save_requirements=False, host="hidden", finish_timeout=options.flush_seconds,
        )  # fmt: skip
        mode: Literal["disabled", "offline"] = "disabled" if options.mode == "disabled" else "offline"
        self._run = wandb.init(
            **self._init, mode=mode, dir=self.folder, reinit="create_new", settings=settings
        )
        self._run.define_metric("frame")
        self._run.define_metric("*", step_metric="frame")
        if options.mode == "online":
            self.uploader = Uploader.of_process(options, self.folder)
            try:
                self.uploader.send(self, Path(self._run.dir).parent, wandb.setup().settings.base_url)
            except OSError as error:
                self.sent(f"the process that uploads is gone ({error})")

    def scalars(
        self, values: Mapping[str, float], chunk: int | None, frame: int | None, clip: int | None
    ) -> None:
        """Numbers of a chunk are one line of W&B's history, written when the next chunk's come."""
        if (chunk, frame) != self._place:
            self._write()
            self._place = (chunk, frame)
        for name, value in values.items():
            if clip is None:
                self._line[name] = value
            else:
                self._line[f"{name}/clip{clip}"] = value
                self._clips.setdefault(name, []).append(value)

    def table(self, name: str, table: "pd.DataFrame") -> None:
        import wandb

        self._log({name: wandb.Table(dataframe=table)})

    def image(self, name: str, path: Path) -> None:
        import wandb

        self._log({name: wandb.Image(str(path))})

    def video(self, name: str, path: Path) -> None:
        import wandb

        self._log({name: wandb.Video(str(path), format="mp4")})

    def finish(self, status: str) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if not self.broken:
                self._run = run
                self._write()
                means = {f"{name}/mean": total / count for name, (total, count) in self._sums.items()}
                run.summary.update({**(means if self._whole else {}), "status": status})
        finally:
            self._run = None
            run.finish(exit_code=0 if status == "done" else 1)
            self._closed = True

    def _write(self) -> None:
        """Hand over the line that was collected."""
        line, self._line = self._line, {}
        line |= {name: mean for name, values in self._clips.items() if (mean := _mean(values)) is not None}
        self._clips = {}
        chunk, frame = self._place
        if not line or self._run is None:
            return
        if chunk is None:
            self._run.summary.update(line)
            return
        for name, value in line.items():
            if not math.isnan(value) and "/clip" not in name:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        # A resumed run is a second offline run of the same id: equal steps for equal chunks. W&B drops steps that go
        # back, so those get the next free one.
        step = chunk if chunk >= self._run.step else None
        self._run.log(
            {**line, "chunk": chunk, "frame": chunk if frame is None else frame}, step=step, commit=True
        )

    def _log(self, record: dict[str, Any]) -> None:
        self._write()
        if self._run is not None:
            self._run.log(record)

    def _note(self, problem: str, consequence: str) -> None:
        """Tell of a problem in the log and beside the offline run; the first is the one for the run's summary."""
        self.problem = self.problem or f"W&B: {problem}"
        logger.warning("W&B: %s; %s", problem, consequence)
        with suppress(OSError):  # the disk may be what is wrong
            (self.folder / "wandb").mkdir(exist_ok=True)
            with (self.folder / "wandb" / PROBLEM).open("a") as file:
                file.write(f"W&B: {problem}; {consequence}\n")


def _tag(label: str, value: Any) -> str:
    return f"protocol {value}" if label == "protocol" else str(value)


def _mean(values: list[float]) -> float | None:
    """Over clips that have the value, as in the store's tables; None if none has it."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else None
