"""Training modules of small networks, and clips that are made without a simulator."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastar.backbones import AutoencoderConfig, Backbone, build_backbone
from fastar.backbones.autoencoder import Autoencoder
from fastar.backbones.checkpoint import save_backbone
from fastar.backbones.wan.config import WanConfig
from fastar.training.autoencoder import AutoencoderModule
from fastar.training.clips import ClipLoaders
from fastar.training.module import TimedModule
from fastar.training.run import fit, forget
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


def fresh_backbone(**more: Any) -> Backbone:
    """Untrained transformer and autoencoder for frames of 16x32 pixels, two tokens each; `more` of its sizes."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "freq_dim": 32} | more
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


class MovingBars:
    """Clips of a bar that moves as the actions say (0 none, 1 right, 2 left).

    Args:
        frames: of a clip.
        fails_at: the clip that cannot be made, as when power fails.
        signals: names of signals that this process is sent, by the number of the clip that it makes meanwhile.
        only_rank: the process that is sent them, if there are several.
    """

    def __init__(
        self,
        *,
        frames: int = 8,
        fails_at: int | None = None,
        signals: Mapping[int, str] | None = None,
        only_rank: int = 0,
        **_: Any,
    ) -> None:
        self.frames, self.fails_at, self.only_rank = frames, fails_at, only_rank
        self.signals = dict(signals or {})
        self.made: list[int] = []

    def numbered(self, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        for number in numbers:
            if number == self.fails_at:
                raise ConnectionError("the power went off")
            if number in self.signals and int(os.environ.get("RANK", "0")) == self.only_rank:
                os.kill(os.getpid(), getattr(signal, self.signals[number]))
            self.made.append(number)
            actions = torch.randint(3, (self.frames,), generator=torch.Generator().manual_seed(number))
            steps = torch.tensor([0, 4, -4])[actions].cumsum(0)
            columns = (torch.arange(32) - steps[:, None]) % 32
            shade = torch.where(columns < 12, 230, 25).to(torch.uint8)
            frames = shade[:, None, :, None].expand(-1, 16, -1, 3).contiguous()
            yield {"frames": frames, "actions": actions, "index": torch.tensor(number)}


def train(
    module: TimedModule,
    backbone: Backbone,
    output: Path,
    *,
    name: str = "transformer",
    clips: MovingBars | None = None,
    **options: Any,
) -> None:
    """`fit` of steps of two clips, as the stages call it."""

    def export(average: Any, folder: Path) -> None:
        transformer = getattr(average, "transformer", backbone.transformer)
        save_backbone(folder, Backbone(backbone.config, transformer, average.autoencoder))

    stage: dict[str, Any] = {"export_every_minutes": 60.0, "ema_decay": 0.9, "precision": "auto"}
    loaders = ClipLoaders(clips or MovingBars(), batch_clips=2, num_workers=0)
    fit(module, loaders, name=name, output=output, export=export, **stage | options)
    forget(output, name)


def moving_bars(output: Path, *more: str) -> list[str]:
    """Overrides of conf/train.yaml: both stages of the tiny backbone in a second or two, without a simulator."""
    return [
        "backbone=tiny",
        "backbone.frame_size=[16,32]",
        "data=doom_tiny",
        "data.train._target_=tests.training.small.MovingBars",
        "training=tiny",
        "training.autoencoder.statistics_clips=1",
        "training.autoencoder.max_steps=8",
        "training.transformer.max_steps=28",
        f"output={output}",
        *more,
    ]
