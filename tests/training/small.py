"""Training modules of small networks, and clips that are made without a simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastar.backbones import AutoencoderConfig, Backbone, build_backbone
from fastar.backbones.autoencoder import Autoencoder
from fastar.backbones.checkpoint import save_backbone
from fastar.backbones.wan.config import WanConfig
from fastar.training.autoencoder import AutoencoderModule
from fastar.training.module import TimedModule
from fastar.training.run import fit, make_loader
from fastar.training.world_model import WorldModelModule
from tests.small import CHUNK

LIMITS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "optimizer": "muon",
    "max_steps": 30,
    "max_minutes": None,
    "warmup_steps": 5,
    "decay_share": 0.5,
    "gradient_clip": 1.0,
}
AUTOENCODER = AutoencoderConfig(
    latent_channels=4,
    encoder_widths=(16, 16, 16),
    encoder_blocks=(0, 0, 1),
    decoder_widths=(16, 16, 16),
    decoder_blocks=(0, 0, 1),
)


def fresh_backbone() -> Backbone:
    """Untrained transformer and autoencoder for frames of 16x32 pixels, two tokens each."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "freq_dim": 32}
    return build_backbone(
        name="small",
        transformer=WanConfig(**sizes, in_channels=4, out_channels=4, num_actions=3),
        autoencoder=AUTOENCODER,
        frame_size=(16, 32),
        chunk_frames=CHUNK,
        context_frames=8,
    )


def world_model(backbone: Backbone, **options: Any) -> WorldModelModule:
    """Its autoencoder, or one that nothing is asked of if it has none."""
    stage = {
        "chunk_frames": CHUNK,
        "shift": 3.0,
        "history_noise": 0.15,
        "self_history_share": 0.5,
        "self_history_from": 0.5,
        "short_frames": CHUNK,
        "short_until": 0.0,
        "max_first_frame": 100,
        "compile": False,
    }
    return WorldModelModule(
        backbone.transformer, backbone.autoencoder or Autoencoder(AUTOENCODER), **LIMITS | stage | options
    )


def autoencoder_model(backbone: Backbone, **options: Any) -> AutoencoderModule:
    assert backbone.autoencoder is not None
    return AutoencoderModule(
        backbone.autoencoder,
        **LIMITS | {"latent_noise": 0.02, "compile": False, "optimizer": "adamw"} | options,
    )


class MovingBars(IterableDataset[dict[str, Tensor]]):
    """A bar that moves as the actions say (0 none, 1 right, 2 left). May fail after some clips, as power does."""

    def __init__(self, *, frames: int = 8, fails_after: int | None = None) -> None:
        self.frames, self.fails_after = frames, fails_after
        self.made = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while self.fails_after is None or self.made < self.fails_after:
            actions = torch.randint(3, (self.frames,), generator=generator)
            steps = torch.tensor([0, 4, -4])[actions].cumsum(0)
            columns = (torch.arange(32) - steps[:, None]) % 32
            shade = torch.where(columns < 12, 230, 25).to(torch.uint8)
            self.made += 1
            yield {"frames": shade[:, None, :, None].expand(-1, 16, -1, 3).contiguous(), "actions": actions}
        raise ConnectionError("the power went off")


def train(
    module: TimedModule,
    backbone: Backbone,
    output: Path,
    *,
    name: str = "transformer",
    dataset: MovingBars | None = None,
    **options: Any,
) -> None:
    """`fit` as experiments/train.py calls it."""

    def export(average: Any, folder: Path) -> None:
        transformer = getattr(average, "transformer", backbone.transformer)
        save_backbone(folder, Backbone(backbone.config, transformer, average.autoencoder))

    stage: dict[str, Any] = {"export_every_minutes": 60.0, "ema_decay": 0.9, "precision": "auto"}
    loader = make_loader(dataset or MovingBars(), batch_clips=2, num_workers=0)
    fit(module, loader, name=name, output=output, export=export, **stage | options)
