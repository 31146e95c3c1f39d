"""The stages of a training: the autoencoder, then the causal transformer in its latents. See experiments/train.py.

What is done is kept in the run's folder, so that the same command goes on from there:
    autoencoder/last.ckpt    while stage 1 is not finished
    autoencoder_finished     its result, with the latents' statistics
    transformer/last.ckpt    while stage 2 is not finished
    checkpoint               the result
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastar.backbones import Backbone, load_backbone, save_backbone
from fastar.backbones.checkpoint import read_config
from fastar.data.pixels import to_model_range
from fastar.interruption import Interrupted, slurm_job
from fastar.training.autoencoder import AutoencoderModule, measure_latents
from fastar.training.clips import ClipLoaders
from fastar.training.module import TimedModule
from fastar.training.processes import (
    alone_in,
    connected,
    find_layout,
    is_first,
    is_helper,
    of_first,
    stop_if_requested,
)
from fastar.training.run import CHECKPOINT, fit, forget
from fastar.training.world_model import WorldModelModule

log = logging.getLogger(__name__)
STAGES = ("autoencoder", "transformer")
RESULT, RESULT_FLOAT32, AUTOENCODER = "checkpoint", "checkpoint_float32", "autoencoder_finished"
FORCED = "forced"  # names the Slurm job that has begun anew


def train(config: DictConfig) -> None:
    """Run the stages named in `training.stages` and write the result to `output`/checkpoint.

    Raises:
        Interrupted: a signal came (`fastar.interruption`); what was done is saved.
        ValueError, FileNotFoundError: a setting or a file that a person has to put right.
    """
    unknown = [stage for stage in config.training.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"unknown training stage '{unknown[0]}': choose from {', '.join(STAGES)}")
    output, layout, first = Path(config.output), find_layout(), True
    try:
        with connected(layout):
            first = is_first()
            if is_helper(layout):  # the first process holds the lock and has looked already
                run_stages(config)
                return
            output.mkdir(parents=True, exist_ok=True)
            with alone_in(output):
                if first and config.force:
                    begin_anew(output)
                if of_first((output / RESULT / "config.json").exists()):
                    log.info("%s is trained already: say force=true to train it anew", output)
                else:
                    run_stages(config)
    except Interrupted:
        if not first:  # the first one tells how it ended; whoever started us may kill it if another one fails
            raise SystemExit(0) from None
        raise


def begin_anew(output: Path) -> None:
    """Remove what an earlier training left, once: a requeued Slurm job goes on, though its command says force=true."""
    job, marker = slurm_job(), output / FORCED
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if requeued and marker.exists() and marker.read_text() == job:
        return
    folders = [RESULT, RESULT_FLOAT32, AUTOENCODER, *STAGES, *(f"{stage}_ema" for stage in STAGES)]
    for name in folders:
        if (output / name).exists():
            shutil.rmtree(output / name)
    marker.unlink(missing_ok=True)
    if job is not None:
        marker.write_text(job)


def run_stages(config: DictConfig) -> None:
    """From wherever the run stands to its result."""
    output = Path(config.output)
    torch.set_float32_matmul_precision("high")
    lightning.seed_everything(config.seed, workers=True)
    backbone: Backbone = instantiate(config.backbone)
    if config.training.init_from is not None:
        load_weights(backbone, Path(config.training.init_from))
    finished = output / AUTOENCODER
    if "autoencoder" in config.training.stages and (finished / "config.json").exists():
        log.info("the autoencoder stage of this run is finished already: %s", finished)
        load_weights(backbone, finished)
    elif "autoencoder" in config.training.stages:
        train_autoencoder(config, backbone, finished)
    if "transformer" in config.training.stages:
        train_transformer(config, backbone)
    if is_first():
        save_backbone(output / RESULT_FLOAT32, backbone)  # to state what the storage format costs
        export(config, backbone, output / RESULT)  # last: it marks the run as finished
        forget(output, "transformer")
        log.info("wrote the checkpoint to %s", output / RESULT)


def load_weights(backbone: Backbone, folder: Path) -> None:
    """Replace the weights of `backbone` by those of a checkpoint folder of the same sizes."""
    start = load_backbone(folder)
    if start.config != backbone.config:
        raise ValueError(
            f"the checkpoint in {folder} has other sizes than backbone={backbone.config.name}: use its own"
        )
    for name, network in backbone.modules().items():
        network.load_state_dict(start.modules()[name].state_dict())


def stage_options(config: DictConfig, name: str) -> dict[str, Any]:
    """The fields of `training.<name>` as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(config.training[name], resolve=True))


def train_autoencoder(config: DictConfig, backbone: Backbone, finished: Path) -> None:
    """Stage 1; ends by measuring the latents' statistics, which become part of the autoencoder.

    The result is kept in full precision in the folder `finished`, from which an interrupted run goes on.
    """
    assert backbone.autoencoder is not None
    stage = stage_options(config, "autoencoder")
    batch = {name: stage.pop(name) for name in ("batch_clips", "frames")}
    statistics_clips, temper = stage.pop("statistics_clips"), stage.pop("temper")
    output = Path(config.output)
    if config.training.init_from is None and not (output / "autoencoder" / CHECKPOINT).exists():
        clips = first_clips(config, 8 * statistics_clips, frames=batch["frames"])
        frames = [clip["frames"][::16] for clip in clips]
        backbone.autoencoder.fit_linear(to_model_range(torch.stack(frames)).flatten(0, 1))
    module = AutoencoderModule(
        backbone.autoencoder, compile=should_compile(config), seed=config.seed, **stage
    )
    run_stage(config, backbone, module, "autoencoder", **batch)
    statistics = [clip["frames"][None] for clip in first_clips(config, statistics_clips)]
    measure_latents(backbone.autoencoder, statistics, temper=temper)
    if is_first():
        save_backbone(finished, backbone, storage="float32")
        forget(output, "autoencoder")
    stop_if_requested()


def first_clips(config: DictConfig, count: int, **options: Any) -> list[dict[str, Tensor]]:
    """The first training clips, made in this process: the same ones in every rank."""
    return list(instantiate(config.data.train, **options).numbered(range(count)))


def train_transformer(config: DictConfig, backbone: Backbone) -> None:
    """Stage 2, with the autoencoder frozen."""
    assert backbone.autoencoder is not None
    stage = stage_options(config, "transformer")
    batch = {name: stage.pop(name) for name in ("batch_clips", "frames")}
    module = WorldModelModule(
        backbone.transformer,
        backbone.autoencoder,
        chunk_frames=backbone.config.chunk_frames,
        compile=should_compile(config),
        seed=config.seed,
        **stage,
    )
    run_stage(config, backbone, module, "transformer", **batch)


def should_compile(config: DictConfig) -> bool:
    """`training.compile`, where auto means: on CUDA."""
    return torch.cuda.is_available() if config.training.compile == "auto" else config.training.compile


def run_stage(
    config: DictConfig, backbone: Backbone, module: TimedModule, name: str, *, batch_clips: int, frames: int
) -> None:
    """Fit one stage on batches of clips of `frames` frames.

    EMA weights are exported while it runs, and are what `backbone` holds afterwards.
    """

    def export_average(average: Any, folder: Path) -> None:
        transformer = average.transformer if name == "transformer" else backbone.transformer
        export(config, Backbone(backbone.config, transformer, average.autoencoder), folder)

    clips = instantiate(config.data.train, frames=frames)
    fit(
        module,
        ClipLoaders(clips, batch_clips=batch_clips, num_workers=config.training.num_workers),
        name=name,
        output=Path(config.output),
        export=export_average,
        export_every_minutes=config.training.export_every_minutes,
        ema_decay=config.training.ema_decay,
        precision=config.training.precision,
    )


def export(config: DictConfig, backbone: Backbone, folder: Path) -> None:
    """Write a checkpoint folder with the record of how it came about."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    record = {name: plain[name] for name in ("seed", "data", "training")}
    if config.training.init_from is not None:  # its weights matter, not where they lay
        record["training"]["init_from"] = f"sha256 {read_config(config.training.init_from)['sha256']}"
    save_backbone(folder, backbone, storage=config.training.storage, training=record)
