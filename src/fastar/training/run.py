"""One training stage through Lightning: data, trainer, EMA export, checkpoints, resume."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from fastar.training.callbacks import ExportingEMA, MetricsFile, ProgressLine, ResumableCheckpoint
from fastar.training.clips import ClipLoaders
from fastar.training.module import TimedModule
from fastar.training.processes import find_layout

CHECKPOINT = "last.ckpt"  # in a stage's folder while its result is not safe
METRICS = "metrics.csv"


def fit(
    module: TimedModule,
    loaders: ClipLoaders,
    *,
    name: str,
    output: Path,
    export: Callable[[Any, Path], None],
    export_every_minutes: float,
    ema_decay: float,
    precision: str,
) -> None:
    """Train `module` until its step or time limit; afterwards it holds the EMA weights.

    A checkpoint is kept in `output/name`; if one lies there, the interrupted stage goes on from it. The caller removes
    it (`forget`) once it has stored what it makes of the result.

    Raises:
        Interrupted: a signal came, and the checkpoint is written.
        ValueError: the checkpoint that lies there is damaged or does not fit.
    """
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / CHECKPOINT
    check_fits(unfinished, module)
    layout, on_gpu = find_layout(), torch.cuda.is_available()
    ema = ExportingEMA(
        decay=ema_decay, export=export, folder=output / f"{name}_ema", every_minutes=export_every_minutes
    )
    checkpoints = ResumableCheckpoint(unfinished, every_minutes=export_every_minutes)
    trainer = lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=layout.devices,
        num_nodes=layout.nodes,
        strategy="ddp" if layout.total > 1 else "auto",
        plugins=[layout.environment],
        precision=("bf16-mixed" if on_gpu else "32-true") if precision == "auto" else precision,  # type: ignore[arg-type]
        max_steps=module.progress.max_steps,
        logger=False,
        callbacks=[ema, MetricsFile(folder / METRICS), ProgressLine(), checkpoints],
        enable_checkpointing=False,  # Lightning's own kind
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        datamodule=loaders,
        ckpt_path=str(unfinished) if unfinished.exists() else None,
        weights_only=False,
    )
    if trainer.is_global_zero:
        export(module, ema.folder)


def forget(output: Path, name: str) -> None:
    """Remove the checkpoint of a stage whose result is stored."""
    (output / name / CHECKPOINT).unlink(missing_ok=True)


def check_fits(path: Path, module: TimedModule) -> None:
    """Whether `module` can go on from the checkpoint at `path`, if there is one.

    Raises:
        ValueError: it is damaged, of another network, or further than the stage is to go.
    """
    if not path.exists():
        return
    anew = "choose another output=..., or say force=true to train anew"
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        shapes = {key: value.shape for key, value in found["current_model_state"].items()}
        steps = int(found["progress"]["steps"])
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the checkpoint {path} is damaged ({reason}): remove it to train this stage anew"
        ) from error
    if shapes != {key: value.shape for key, value in module.state_dict().items()}:
        raise ValueError(f"the interrupted training in {path} has a backbone of other sizes: {anew}")
    if steps >= module.progress.max_steps:
        limit = module.progress.max_steps
        raise ValueError(
            f"the interrupted training in {path} has done {steps} steps, max_steps is {limit}: {anew}"
        )
