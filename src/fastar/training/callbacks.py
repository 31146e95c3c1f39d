"""EMA weights that are written out as a usable checkpoint while training goes on, and a plain progress line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from fastar.training.module import SYNC_EVERY


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


class TimedCheckpoint(Callback):
    """Keeps a checkpoint from which an interrupted stage goes on: weights, EMA, optimisers, progress.

    Lightning's ModelCheckpoint heeds no time interval under manual optimisation. Place it after the EMA callback.

    Args:
        path: the file; each checkpoint replaces the last.
        every_minutes: time between checkpoints, rounded up to whole periods of `SYNC_EVERY` steps.
    """

    def __init__(self, path: Path, *, every_minutes: float) -> None:
        self.path, self.every_seconds = path, 60 * every_minutes
        self._last = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step % SYNC_EVERY:
            return
        now = time.monotonic()
        # all ranks save together, by rank 0's clock
        if trainer.strategy.broadcast(now - self._last >= self.every_seconds):
            self._last = now
            trainer.save_checkpoint(self.path, weights_only=False)


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
