"""A backbone with its loop on a device: encode, decode, start rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastar.backbones import Backbone, ImageCondition, Prompts
from fastar.backbones.codec import VideoCodec, pixel_frames
from fastar.backbones.pretrained import load_checkpoint
from fastar.cache import CachePolicy
from fastar.compare.clips import AnyClips
from fastar.compare.latents import LatentClips
from fastar.compare.played import PlayedClip
from fastar.compare.prompt_clips import PromptClips
from fastar.compare.prompted import PromptedClip
from fastar.compare.screen import Screen
from fastar.compare.weights import random_backbone
from fastar.data.pixels import to_model_range
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import PassTimer, Rollout
from fastar.sparsity.base import check_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANDOM = "random"
FRAMES_AT_ONCE = 32  # of an autoencoder that knows single frames, per video: bounds its memory


@dataclass
class Session:
    """What all rollouts of a command share.

    Attributes:
        backbone: in eval mode on its device.
        autoencoder: its own, in float32, or the one that the config names beside it; None without any.
        loop: passes of a chunk.
        weights: sha256 of the weights.
        autoencoder_weights: sha256 of those of an autoencoder that is not the backbone's own.
    """

    backbone: Backbone
    autoencoder: VideoCodec | None
    loop: ChunkLoop
    device: torch.device
    weights: str
    autoencoder_weights: str | None = None

    @property
    def parts(self) -> dict[str, str]:
        """sha256 of what computes beside the backbone, or is merged into it, by name: for the identity of a run."""
        known = {"autoencoder": self.autoencoder_weights, "lora": self.backbone.lora_sha256}
        return {name: sha256 for name, sha256 in known.items() if sha256 is not None}

    @property
    def chunk(self) -> int:
        """Frames of a chunk."""
        return self.loop.chunk_frames

    def needed(self, first: int) -> slice:
        """Frames whose actions the step that makes the chunk at frame `first` needs."""
        return slice(first, first + self.loop.frames_in_flight)

    @property
    def stride(self) -> int:
        """Pixel frames of a latent frame after the first; 1 without an autoencoder, where latent frames are counted."""
        return 1 if self.autoencoder is None else self.autoencoder.temporal_stride

    def eyes(self) -> VideoCodec:
        """The autoencoder.

        Raises:
            ValueError: there is none.
        """
        if self.autoencoder is None:
            raise ValueError(
                f"the backbone '{self.backbone.config.name}' has no autoencoder to see pixels with: add one, "
                "as in autoencoder=wan"
            )
        return self.autoencoder

    def beginning(self, clips: AnyClips | PromptedClip) -> Tensor:
        """Latents [B, prefill, C, h, w] of the frames that a rollout of `clips` is given, on the device."""
        if isinstance(clips, LatentClips):
            return clips.latents.to(self.device)
        if isinstance(clips, PromptedClip | PlayedClip) or not clips.prefill:
            shape = (clips.batch, 0, *self.backbone.config.latent_shape)
            return torch.empty(shape, device=self.device)
        return self.encode(clips.frames[:, : pixel_frames(clips.prefill, self.stride)])

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] from the first frame of a video on -> latents float32 [B, n, C, h, w] on the device."""
        parts = frames.split(FRAMES_AT_ONCE if self.stride == 1 else frames.shape[1], dim=1)
        return torch.cat([self.eyes().encode(to_model_range(part.to(self.device))) for part in parts], 1)

    def told(self, clips: AnyClips | PromptedClip) -> dict[str, Any]:
        """What `start` takes of `clips`: prompts, the image they start from, and where they end."""
        return {
            "prompts": clips.prompts,
            "negative": clips.negative if isinstance(clips, PromptClips) else None,
            "image": self.image_of(clips),
            "end_frame": clips.end,
        }

    @torch.inference_mode()
    def image_of(self, clips: AnyClips | PromptedClip) -> ImageCondition | None:
        """What the backbone is told of the image that `clips` start from; None where they start from none.

        As Wan I2V and Matrix-Game 2.0 have it: the latents are of a video of the image and grey frames after it.
        """
        if not isinstance(clips, PromptClips | PlayedClip) or clips.start is None:
            return None
        image = to_model_range(clips.start.frames.to(self.device))
        blank = pixel_frames(clips.end, self.stride) - 1
        video = torch.cat([image, image.new_zeros(clips.batch, blank, *image.shape[2:])], dim=1)
        return ImageCondition.of_first_frame(
            clips.start.tokens.to(self.device), self.eyes().encode(video).float()
        )

    def screen(self, clips: AnyClips | PromptedClip) -> Screen:
        """Where a rollout of `clips` is shown."""
        return Screen(self, clips)

    def start(
        self,
        method: Method,
        seeds: Sequence[int],
        *,
        prompts: Prompts | None = None,
        negative: Prompts | None = None,
        timer: PassTimer | None = None,
        recorders: Sequence = (),
        cache: CachePolicy | None = None,
        end_frame: int | None = None,
        image: ImageCondition | None = None,
        capture: bool = False,
    ) -> Rollout:
        """A rollout at frame 0; see `start_rollout`."""
        return start_rollout(
            self.backbone,
            method,
            loop=self.loop,
            seeds=seeds,
            prompts=prompts,
            negative=negative,
            timer=timer,
            recorders=recorders,
            cache=cache,
            end_frame=end_frame,
            image=image,
            capture=capture,
        )


def passes_of(rollout: DictConfig) -> dict[str, Any]:
    """What a config of conf/rollout says of the passes; its window decides something where a method uses it."""
    plain: Any = OmegaConf.to_container(rollout, resolve=True)
    return {key: value for key, value in plain.items() if key != "window"}


def open_session(config: DictConfig) -> Session:
    """Load what `config` names: backbone, checkpoint, autoencoder, rollout, device, dtype, threads.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, a damaged one, or one of another backbone.
    """
    check_choice("dtype", config.dtype, tuple(DTYPES))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device(best_device() if config.device == "auto" else config.device)
    if config.get("lora") is not None and config.checkpoint == RANDOM:
        raise ValueError(
            "a LoRA changes weights that mean something: leave lora=... out, or name its checkpoint"
        )
    if config.checkpoint == RANDOM:
        backbone = random_backbone(config.backbone, device)
    else:
        backbone = load_checkpoint(
            config.checkpoint,
            partial(instantiate, config.backbone, device="meta"),
            device=device,
            dtype=DTYPES[config.dtype],
            use_ema=config.get("use_ema", True),
            lora=config.get("lora"),
            lora_alpha=config.get("lora_alpha"),
            store=config.paths.checkpoints,
            cache=config.paths.cache,
        )
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
    if config.get("autoencoder") is None:
        return Session(backbone, backbone.autoencoder, loop, device, backbone.sha256)
    autoencoder = instantiate(config.autoencoder, device=str(device))
    return Session(backbone, autoencoder, loop, device, backbone.sha256, autoencoder.sha256)


def best_device() -> str:
    """CUDA if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
