"""EMA weights that are written out while training goes on, checkpoints to go on from, metrics and a progress line."""

import csv
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from fastar import interruption
from fastar.results.files import atomic
from fastar.training.module import SYNC_EVERY, TimedModule
from fastar.training.processes import anywhere, of_first, stop, stop_if_requested


def warming_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """EMA whose decay grows with the number n of updates, min(decay, (1 + n) / (10 + n)).

    With a fixed decay of 0.999 a run of 600 steps would end with 55 % of its random start in the average.
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor) -> Tensor:
        kept = ((1 + updates) / (10 + updates)).clamp(max=decay)
        return torch.lerp(current, averaged, kept.to(current.dtype))

    return average


class ExportingEMA(WeightAveraging):
    """EMA of the weights; every few minutes rank 0 exports the averaged module.

    Args:
        decay: EMA decay per step, once the run is long enough for it (see `warming_average`).
        export: called as `export(averaged_module, folder)`.
        folder: where exports go; each overwrites the last.
        every_minutes: time between exports.
    """

    def __init__(
        self,
        *,
        decay: float,
        export: Callable[[Any, Path], None],
        folder: Path,
        every_minutes: float,
    ) -> None:
        super().__init__(avg_fn=warming_average(decay))
        self.export, self.folder, self.every_seconds = export, folder, 60 * every_minutes
        self._last_export = time.monotonic()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module itself is still on the CPU at this point
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if time.monotonic() - self._last_export > self.every_seconds:
            self._last_export = time.monotonic()
            self._export_average()

    @rank_zero_only
    def _export_average(self) -> None:
        assert self._average_model is not None
        with torch.no_grad():
            self.export(self._average_model.module, self.folder)
        rank_zero_info(f"exported EMA weights to {self.folder.name}")


class ResumableCheckpoint(Callback):
    """Keeps a checkpoint from which an interrupted stage goes on: weights, EMA, optimisers, progress.

    It is written every few minutes, and at the end of the step in which a signal reaches any of the processes
    (`fastar.interruption`); then the stage ends with `Interrupted`. A signal in the last step changes nothing: the
    stage's result is next. The file is replaced as a whole or not at all. Place it after all other callbacks, which
    shall have seen the step. Lightning's ModelCheckpoint heeds no time interval under manual optimisation.

    Args:
        path: the file; each checkpoint replaces the last.
        every_minutes: time between checkpoints, rounded up to whole periods of `SYNC_EVERY` steps.
    """

    def __init__(self, path: Path, *, every_minutes: float) -> None:
        self.path, self.every_seconds = path, 60 * every_minutes
        self._last = time.monotonic()
        self._handlers = {number: signal.getsignal(number) for number in interruption.SIGNALS}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # Lightning has put its own SIGTERM handler before ours: it ends the run unsaved, and talks to the other
            # processes from within the handler, whatever they are at
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        stop_if_requested()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        # Lightning itself waits for all processes once a step, so asking them costs little
        requested = anywhere(interruption.requested())
        # all processes save together, by the clock of the first
        due = trainer.global_step % SYNC_EVERY == 0 and of_first(
            time.monotonic() - self._last >= self.every_seconds
        )
        if trainer.should_stop or trainer.global_step >= trainer.max_steps:
            return
        if requested or due:
            self._last = time.monotonic()
            self._save(trainer)
        if requested:
            rank_zero_info(f"saved step {trainer.global_step} to {self.path}")
            stop()

    def _save(self, trainer: lightning.Trainer) -> None:
        # Lightning's own way to write atomically goes through a temporary folder, perhaps on another disk
        with atomic(self.path) if trainer.is_global_zero else nullcontext(self.path) as part:
            trainer.save_checkpoint(part, weights_only=False)
        trainer.strategy.barrier()  # nobody ends before the file has its name


class MetricsFile(Callback):
    """A CSV file with a row every `every_steps` steps: step (optimiser steps done), then the logged values by name.

    Lightning's CSVLogger deletes the rows of an interrupted stage when that goes on; here rows of steps that are done
    stay, and those of steps that will be done again go. So the file ends with the same rows, interrupted or not.
    """

    def __init__(self, path: Path, *, every_steps: int = 25) -> None:
        self.path, self.every_steps = path, every_steps

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TimedModule)
        kept = rows_until(self.path, pl_module.steps_done)
        with atomic(self.path) as part:
            part.write_text("".join(kept))

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step % self.every_steps:
            return
        values = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(["step", *values])
            writer.writerow([trainer.global_step, *values.values()])


def rows_until(path: Path, steps: int) -> list[str]:
    """Header and rows of a `MetricsFile` up to step `steps`; a row that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= steps]
    return [lines[0], *rows] if rows else []


class ProgressLine(Callback):
    """One line every `every_steps` steps: step, share of the run, losses, steps a second."""

    def __init__(self, every_steps: int = 50) -> None:
        self.every_steps = every_steps
        self._since: tuple[int, float] | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step % self.every_steps and step != 1:
            return
        now = time.monotonic()
        rate = (
            "" if self._since is None else f" {(step - self._since[0]) / (now - self._since[1]):.2f} steps/s"
        )
        self._since = (step, now)
        values = " ".join(
            f"{name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items())
        )
        rank_zero_info(f"step {step}{rate} {values}")
