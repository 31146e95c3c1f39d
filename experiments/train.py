"""Train a backbone on data that is made as it goes: the autoencoder, then the causal transformer in its latents.

    python experiments/train.py backbone=doom

See conf/train.yaml for the options; the result is a checkpoint folder that `checkpoint=...` loads.
"""

import logging
import os
from pathlib import Path
from typing import Any, cast

import hydra
import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from fastar.backbones import Backbone, load_backbone, save_backbone
from fastar.backbones.checkpoint import read_config
from fastar.data.pixels import to_model_range
from fastar.training.autoencoder import AutoencoderModule, measure_latents
from fastar.training.module import TimedModule
from fastar.training.run import fit, interrupted_steps, make_loader
from fastar.training.world_model import WorldModelModule

log = logging.getLogger(__name__)
STAGES = ("autoencoder", "transformer")


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run the stages named in `training.stages` and write the result to `output`/checkpoint."""
    unknown = [stage for stage in config.training.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"unknown training stage '{unknown[0]}': choose from {', '.join(STAGES)}")
    output = Path(config.output)
    if (output / "checkpoint" / "config.json").exists() and not config.force:
        log.info("%s is trained already: say force=true to train it anew", output)
        return
    torch.set_float32_matmul_precision("high")
    lightning.seed_everything(config.seed, workers=True)
    backbone: Backbone = instantiate(config.backbone)
    if config.training.init_from is not None:
        load_weights(backbone, Path(config.training.init_from))
    finished = output / "autoencoder_finished"
    if "autoencoder" in config.training.stages and (finished / "config.json").exists() and not config.force:
        log.info("the autoencoder stage of this run is finished already: %s", finished)
        load_weights(backbone, finished)
    elif "autoencoder" in config.training.stages:
        train_autoencoder(config, backbone, finished)
    if "transformer" in config.training.stages:
        train_transformer(config, backbone)
    if is_first_process():
        save_backbone(output / "checkpoint_float32", backbone)  # to state what the storage format costs
        export(config, backbone, output / "checkpoint")  # last: it marks the run as finished
        log.info("wrote the checkpoint to %s", output / "checkpoint")


def load_weights(backbone: Backbone, folder: Path) -> None:
    """Replace the weights of `backbone` by those of a checkpoint folder of the same sizes."""
    start = load_backbone(folder)
    if start.config != backbone.config:
        raise ValueError(
            f"the checkpoint in {folder} has other sizes than backbone={backbone.config.name}: use its own"
        )
    for name, network in backbone.modules().items():
        network.load_state_dict(start.modules()[name].state_dict())


def is_first_process() -> bool:
    """Whether this process writes files (rank 0 of a distributed run, or the only one)."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


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
    frames = [
        clip["frames"][::16] for clip in first_clips(config, 8 * statistics_clips, frames=batch["frames"])
    ]
    if config.training.init_from is None:
        backbone.autoencoder.fit_linear(to_model_range(torch.stack(frames)).flatten(0, 1))
    module = AutoencoderModule(backbone.autoencoder, compile=should_compile(config), **stage)
    run_stage(config, backbone, module, "autoencoder", **batch)
    clips = [clip["frames"][None] for clip in first_clips(config, statistics_clips)]
    measure_latents(backbone.autoencoder, clips, temper=temper)
    if is_first_process():
        save_backbone(finished, backbone, storage="float32")


def first_clips(config: DictConfig, count: int, **options: Any) -> list[dict[str, Tensor]]:
    """The first training clips, made in this process: the same ones in every rank."""
    return list(DataLoader(instantiate(config.data.train, clips=count, **options), batch_size=None))


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

    # A resumed stage goes on with clips that it has not seen.
    processes = int(os.environ.get("WORLD_SIZE", max(torch.cuda.device_count(), 1)))
    first_index = interrupted_steps(Path(config.output), name) * batch_clips * processes
    fit(
        module,
        make_loader(
            instantiate(config.data.train, frames=frames, first_index=first_index),
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
    if config.training.init_from is not None:  # its weights matter, not where they lay
        record["training"]["init_from"] = f"sha256 {read_config(config.training.init_from)['sha256']}"
    save_backbone(folder, backbone, storage=config.training.storage, training=record)


if __name__ == "__main__":
    main()
