"""Clips without pixels: what a comparison runs on where a backbone has no autoencoder, or its pixels mean nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import Prompts


@dataclass
class LatentClips:
    """A batch of clips that are latents from the start, on the CPU; B videos.

    Nothing is decoded, so that scores are those of latents alone, and there is no truth about what follows.

    Attributes:
        latents: [B, prefill, C, h, w], float32, what a rollout is given.
        end: frames of the whole clip, the generated ones included.
        prompts: one per video; None for a backbone that reads no text.
        actions: int64 [B, end]; None for a backbone without actions.
    """

    latents: Tensor
    end: int
    prompts: Prompts | None = None
    actions: Tensor | None = None
    truth: None = None

    @property
    def prefill(self) -> int:
        """Frames that a rollout is given."""
        return self.latents.shape[1]

    @property
    def batch(self) -> int:
        return len(self.latents)

    def actions_in(self, part: slice) -> Tensor | None:
        """Actions of the frames of `part`."""
        return None if self.actions is None else self.actions[:, part]


def noise_clips(node: DictConfig, seeds: Sequence[int], *, prefill: int, generated: int) -> LatentClips:
    """The clips number `seeds` of `node`, a fastar.data.noise.NoiseClips in conf/data."""
    source = instantiate(node)
    items = [source.clip(seed, history=prefill, future=generated) for seed in seeds]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    prompts = Prompts(batch["prompt"], batch["prompt_tokens"]) if "prompt" in batch else None
    return LatentClips(batch["latents"], prefill + generated, prompts, batch.get("actions"))
