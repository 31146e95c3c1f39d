"""A backbone with its loop on a device: encode, decode, start rollouts."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastar.backbones import Autoencoder, Backbone, Prompts, load_backbone
from fastar.cache import CachePolicy
from fastar.compare.clips import AnyClips
from fastar.compare.latents import LatentClips
from fastar.compare.weights import random_backbone
from fastar.data.pixels import to_model_range, to_uint8
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import PassTimer, Rollout
from fastar.sparsity.base import check_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANDOM = "random"
FRAMES_AT_ONCE = 32  # of the autoencoder, per video: bounds its memory


@dataclass
class Session:
    """What all rollouts of a command share.

    Attributes:
        backbone: in eval mode on its device.
        autoencoder: its autoencoder, always in float32; None if it has none.
        loop: passes of a chunk.
        weights: sha256 of the weights.
    """

    backbone: Backbone
    autoencoder: Autoencoder | None
    loop: ChunkLoop
    device: torch.device
    weights: str

    @property
    def chunk(self) -> int:
        """Frames of a chunk."""
        return self.loop.chunk_frames

    def needed(self, first: int) -> slice:
        """Frames whose actions the step that makes the chunk at frame `first` needs."""
        return slice(first, first + self.loop.frames_in_flight)

    def eyes(self) -> Autoencoder:
        """The autoencoder.

        Raises:
            ValueError: there is none.
        """
        if self.autoencoder is None:
            raise ValueError(
                f"the backbone '{self.backbone.config.name}' has no autoencoder to see pixels with"
            )
        return self.autoencoder

    def beginning(self, clips: AnyClips) -> Tensor:
        """Latents [B, prefill, C, h, w] of the frames that a rollout of `clips` is given, on the device."""
        if isinstance(clips, LatentClips):
            return clips.latents.to(self.device)
        return self.encode(clips.frames[:, : clips.prefill])

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> latents float32 [B, F, C, h, w] on the device."""
        parts = frames.split(FRAMES_AT_ONCE, dim=1)
        return torch.cat([self.eyes().encode(to_model_range(part.to(self.device))) for part in parts], 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, n, C, h, w] of a chunk -> uint8 [B, n, H, W, 3] on the CPU."""
        return to_uint8(self.eyes().decode(latents)).cpu()

    def show(self, clips: object, latents: Tensor, timer: PassTimer | None = None) -> Tensor | None:
        """`decode`, timed; None for clips without pixels."""
        if isinstance(clips, LatentClips):
            return None
        with timer.measure("decode") if timer is not None else nullcontext():
            return self.decode(latents)

    @staticmethod
    def joined(shown: Sequence[Tensor | None]) -> Tensor | None:
        """Chunks of `show` as one video."""
        pixels = [chunk for chunk in shown if chunk is not None]
        return torch.cat(pixels, 1) if pixels else None

    def decode_chunks(self, latents: Tensor) -> Tensor:
        """Several chunks, each decoded as it was when it was generated, so that the bits are the same."""
        return torch.cat([self.decode(part) for part in latents.split(self.chunk, dim=1)], dim=1)

    def start(
        self,
        method: Method,
        seeds: Sequence[int],
        *,
        prompts: Prompts | None = None,
        timer: PassTimer | None = None,
        recorders: Sequence = (),
        cache: CachePolicy | None = None,
        end_frame: int | None = None,
    ) -> Rollout:
        """A rollout at frame 0; see `start_rollout`."""
        return start_rollout(
            self.backbone,
            method,
            loop=self.loop,
            seeds=seeds,
            prompts=prompts,
            timer=timer,
            recorders=recorders,
            cache=cache,
            end_frame=end_frame,
        )


def passes_of(rollout: DictConfig) -> dict[str, Any]:
    """What a config of conf/rollout says of the passes; its window decides something where a method uses it."""
    plain: Any = OmegaConf.to_container(rollout, resolve=True)
    return {key: value for key, value in plain.items() if key != "window"}


def open_session(config: DictConfig) -> Session:
    """Load what `config` names: backbone, checkpoint, rollout, device, dtype, threads.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, a damaged one, or one of another backbone.
    """
    check_choice("dtype", config.dtype, tuple(DTYPES))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device(best_device() if config.device == "auto" else config.device)
    if config.checkpoint == RANDOM:
        backbone = random_backbone(config.backbone, device)
    else:
        backbone = load_backbone(config.checkpoint)
    if backbone.config.name != config.backbone.name:
        raise ValueError(
            f"the checkpoint {config.checkpoint} holds the backbone '{backbone.config.name}', but the config says "
            f"'{config.backbone.name}': add backbone={backbone.config.name}"
        )
    backbone.transformer.to(device, DTYPES[config.dtype])
    if backbone.autoencoder is not None:
        backbone.autoencoder.to(device)
    assert backbone.sha256 is not None
    loop = instantiate(config.rollout, chunk_frames=backbone.config.chunk_frames)
    return Session(backbone, backbone.autoencoder, loop, device, backbone.sha256)


def best_device() -> str:
    """CUDA if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
