"""Train a backbone on data that is made as it goes: the autoencoder, then the causal transformer in its latents.

    python experiments/train.py backbone=doom

See conf/train.yaml for the options; the result is a checkpoint folder that `checkpoint=...` loads.
"""

import logging
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from fastar.backbones import Backbone, load_backbone, save_backbone
from fastar.training.autoencoder import AutoencoderModule, measure_latents
from fastar.training.module import TimedModule
from fastar.training.run import fit, make_loader
from fastar.training.world_model import WorldModelModule

log = logging.getLogger(__name__)
STAGES = ("autoencoder", "transformer")


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run the stages named in `training.stages` and write the result to `output`/checkpoint."""
    unknown = [stage for stage in config.training.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"unknown training stage '{unknown[0]}': choose from {', '.join(STAGES)}")
    torch.set_float32_matmul_precision("high")
    lightning.seed_everything(config.seed, workers=True)
    backbone: Backbone = instantiate(config.backbone)
    if config.training.init_from is not None:
        start = load_backbone(config.training.init_from)
        for name, network in backbone.modules().items():
            network.load_state_dict(start.modules()[name].state_dict())
    if "autoencoder" in config.training.stages:
        train_autoencoder(config, backbone)
    if "transformer" in config.training.stages:
        train_transformer(config, backbone)
    if rank_zero_only.rank == 0:
        export(config, backbone, Path(config.output) / "checkpoint")
        log.info("wrote the checkpoint to %s", Path(config.output) / "checkpoint")


def train_autoencoder(config: DictConfig, backbone: Backbone) -> None:
    """Stage 1; ends by measuring the latents' statistics, which become part of the autoencoder."""
    stage = OmegaConf.to_container(config.training.autoencoder, resolve=True)
    assert isinstance(stage, dict) and backbone.autoencoder is not None
    batch = {name: stage.pop(name) for name in ("batch_clips", "frames")}
    statistics_clips = stage.pop("statistics_clips")
    module = AutoencoderModule(backbone.autoencoder, compile=should_compile(config), **stage)
    run_stage(config, backbone, module, "autoencoder", **batch)
    clips = [clip["frames"][None] for clip, _ in zip(instantiate(config.data.train), range(statistics_clips), strict=False)]
    measure_latents(backbone.autoencoder, clips)
    if rank_zero_only.rank == 0:
        export(config, backbone, Path(config.output) / "autoencoder_ema")


def train_transformer(config: DictConfig, backbone: Backbone) -> None:
    """Stage 2, with the autoencoder frozen."""
    stage = OmegaConf.to_container(config.training.transformer, resolve=True)
    assert isinstance(stage, dict) and backbone.autoencoder is not None
    batch = {name: stage.pop(name) for name in ("batch_clips", "frames")}
    module = WorldModelModule(
        backbone.transformer,
        backbone.autoencoder,
        chunk_frames=backbone.config.chunk_frames,
        compile=should_compile(config),
        **stage,
    )
    run_stage(config, backbone, module, "transformer", **batch)


def should_compile(config: DictConfig) -> bool:
    """`training.compile`, where auto means: on CUDA."""
    return torch.cuda.is_available() if config.training.compile == "auto" else config.training.compile


def run_stage(
    config: DictConfig, backbone: Backbone, module: TimedModule, name: str, *, batch_clips: int, frames: int
) -> None:
    """Fit one stage on batches of clips of `frames` frames; EMA weights are exported while it runs, and are what `backbone` holds afterwards."""

    def export_average(average: Any, folder: Path) -> None:
        transformer = average.transformer if name == "transformer" else backbone.transformer
        export(config, Backbone(backbone.config, transformer, average.autoencoder), folder)

    fit(
        module,
        make_loader(
            instantiate(config.data.train, frames=frames),
            batch_clips=batch_clips,
            num_workers=config.training.num_workers,
        ),
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
    save_backbone(folder, backbone, storage=config.training.storage, training=record)


if __name__ == "__main__":
    main()
