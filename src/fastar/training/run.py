"""One training stage through Lightning: data, trainer, EMA export, resume."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from fastar.training.callbacks import ExportingEMA, ProgressLine, TimedCheckpoint
from fastar.training.module import TimedModule

CHECKPOINT = "last.ckpt"  # in a stage's folder while it is not finished


def make_loader(
    dataset: IterableDataset[dict[str, torch.Tensor]], *, batch_clips: int, num_workers: int | str
) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches of clips; `num_workers="auto"` shares the cores of the host between its training processes."""
    if num_workers == "auto":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", max(torch.cuda.device_count(), 1)))
        num_workers = max((os.cpu_count() or 1) // local_processes - 1, 0)
    return DataLoader(
        dataset,
        batch_size=batch_clips,
        num_workers=int(num_workers),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=int(num_workers) > 0,
        prefetch_factor=2 if int(num_workers) > 0 else None,
    )


def interrupted_steps(output: Path, name: str) -> int:
    """Optimiser steps that an interrupted stage `name` in `output` has done; 0 if there is none."""
    unfinished = output / name / CHECKPOINT
    if not unfinished.exists():
        return 0
    return int(torch.load(unfinished, map_location="cpu", weights_only=False)["progress"]["steps"])


def fit(
    module: TimedModule,
    loader: DataLoader[dict[str, torch.Tensor]],
    *,
    name: str,
    output: Path,
    export: Callable[[Any, Path], None],
    export_every_minutes: float,
    ema_decay: float,
    precision: str,
) -> None:
    """Train `module` until its step or time limit; afterwards it holds the EMA weights.

    A Lightning checkpoint is kept in `output/name`; if one lies there, the interrupted stage goes on from it.
    """
    folder = output / name
    on_gpu = torch.cuda.is_available()
    unfinished = folder / CHECKPOINT
    checkpoints = TimedCheckpoint(unfinished, every_minutes=export_every_minutes)
    ema = ExportingEMA(
        decay=ema_decay, export=export, folder=output / f"{name}_ema", every_minutes=export_every_minutes
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices="auto" if on_gpu else 1,
        strategy="ddp" if torch.cuda.device_count() > 1 else "auto",
        precision=("bf16-mixed" if on_gpu else "32-true") if precision == "auto" else precision,  # type: ignore[arg-type]
        max_steps=module.progress.max_steps,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=25,
        callbacks=[ema, checkpoints, ProgressLine()],
        enable_checkpointing=False,  # Lightning's own kind
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module, loader, ckpt_path=str(unfinished) if unfinished.exists() else None, weights_only=False
    )
    if trainer.is_global_zero:
        export(module, ema.folder)
        unfinished.unlink(missing_ok=True)
