"""What the measures of a model card share: the backbone, clips and pixels, rollouts, and where results go."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from fastar.backbones import Backbone, Prompts, load_backbone
from fastar.compare.session import best_device
from fastar.data.pixels import to_model_range, to_uint8
from fastar.metrics.bootstrap import interval
from fastar.metrics.fidelity import frame_psnr
from fastar.results.card import evaluation_page, made_with
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import Rollout

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class Evaluation:
    """A backbone, its loop and the place where results go."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.device = torch.device(config.device if config.device != "auto" else best_device())
        self.backbone: Backbone = load_backbone(config.checkpoint, device=self.device)
        if self.backbone.autoencoder is None:
            raise ValueError(
                f"{config.checkpoint} has no autoencoder to see pixels with: use another checkpoint"
            )
        self.autoencoder = self.backbone.autoencoder
        self.loop: ChunkLoop = instantiate(config.rollout, chunk_frames=self.backbone.config.chunk_frames)
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.made = made_with(self.backbone.sha256, self.loop.timesteps, self.device)
        self.started = time.monotonic()

    def clips(self, name: str, count: int, **options: Any) -> Iterator[Batch]:
        """Batches of `count` clips of the data set `name`, on the device."""
        dataset = instantiate(self.config.data[name], clips=count, **options)
        loader = DataLoader(dataset, batch_size=self.config.batch, num_workers=self.config.num_workers)
        for batch in loader:
            yield {key: value.to(self.device) for key, value in batch.items()}

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> latents, a few frames at a time."""
        parts = [self.autoencoder.encode(to_model_range(part)) for part in frames.split(32, dim=1)]
        return torch.cat(parts, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> uint8 frames, a few frames at a time."""
        return torch.cat(
            [to_uint8(self.autoencoder.decode(part)) for part in latents.split(32, dim=1)], dim=1
        )

    def rollout(
        self, numbers: Sequence[int], method: Method | None = None, prompts: Prompts | None = None
    ) -> Rollout:
        """A fresh rollout of a video for each of `numbers`, which seed the noise; dense unless a method is given."""
        seeds = [self.config.seed * 100_000 + number for number in numbers]
        return start_rollout(
            self.backbone, method or Method(name="dense"), loop=self.loop, seeds=seeds, prompts=prompts
        )

    def report(self, measure: str, **values: Any) -> None:
        """Write one result, in place of an earlier one of the same measure, and show it."""
        row = {
            "measure": measure,
            "seconds": round(time.monotonic() - self.started, 1),
            **values,
            "made": self.made,
        }
        path = self.output / "backbone.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        others = [line for line in lines if json.loads(line)["measure"] != measure]
        lines = [*others, json.dumps(row)]
        path.write_text("\n".join(lines) + "\n")
        (self.output / "backbone.md").write_text(evaluation_page([json.loads(line) for line in lines]))
        log.info("%s", row)


def autoencoder_psnr(ev: Evaluation) -> None:
    """PSNR of decode(encode(frame)) on held-out frames, mean over clips of the clips' mean."""
    values = []
    for batch in ev.clips("heldout", ev.config.clips, frames=32):
        values += frame_psnr(ev.decode(ev.encode(batch["frames"])), batch["frames"]).mean(dim=1).tolist()
    report = interval(values)
    ev.report("autoencoder_psnr", mean=report.mean, low=report.low, high=report.high, clips=report.n)
