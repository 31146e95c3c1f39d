"""A backbone with its loop on a device: encode, decode, start rollouts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import Autoencoder, Backbone, load_backbone
from fastar.cache import CachePolicy
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
        autoencoder: its autoencoder, always in float32.
        loop: passes of a chunk.
        weights: sha256 of the weights.
    """

    backbone: Backbone
    autoencoder: Autoencoder
    loop: ChunkLoop
    device: torch.device
    weights: str

    @property
    def chunk(self) -> int:
        """Frames denoised together."""
        return self.loop.chunk_frames

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> latents float32 [B, F, C, h, w] on the device."""
        parts = frames.split(FRAMES_AT_ONCE, dim=1)
        return torch.cat([self.autoencoder.encode(to_model_range(part.to(self.device))) for part in parts], 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, n, C, h, w] of a chunk -> uint8 [B, n, H, W, 3] on the CPU."""
        return to_uint8(self.autoencoder.decode(latents)).cpu()

    def decode_chunks(self, latents: Tensor) -> Tensor:
        """Several chunks, each decoded as it was when it was generated, so that the bits are the same."""
        return torch.cat([self.decode(part) for part in latents.split(self.chunk, dim=1)], dim=1)

    def start(
        self,
        method: Method,
        seeds: Sequence[int],
        *,
        timer: PassTimer | None = None,
        recorders: Sequence = (),
        cache: CachePolicy | None = None,
    ) -> Rollout:
        """A rollout at frame 0; see `start_rollout`."""
        return start_rollout(
            self.backbone,
            method,
            loop=self.loop,
            seeds=seeds,
            timer=timer,
            recorders=recorders,
            cache=cache,
        )


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
        backbone = random_backbone(config.backbone)
    else:
        backbone = load_backbone(config.checkpoint)
    if backbone.config.name != config.backbone.name:
        raise ValueError(
            f"the checkpoint {config.checkpoint} holds the backbone '{backbone.config.name}', but the config says "
            f"'{config.backbone.name}': add backbone={backbone.config.name}"
        )
    if backbone.autoencoder is None:
        raise ValueError(f"the backbone '{backbone.config.name}' has no autoencoder to see pixels with")
    backbone.transformer.to(device, DTYPES[config.dtype])
    backbone.autoencoder.to(device)
    assert backbone.sha256 is not None
    loop = instantiate(config.rollout, chunk_frames=backbone.config.chunk_frames)
    return Session(backbone, backbone.autoencoder, loop, device, backbone.sha256)


def random_backbone(config: DictConfig, seed: int = 0) -> Backbone:
    """A backbone of `config` with random weights everywhere, also where training starts from zero: for dry runs.

    What attention does then shows in the pictures, which mean nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Backbone = instantiate(config)
        digest = hashlib.sha256()
        for network in backbone.modules().values():
            for parameter in network.eval().parameters():
                with torch.no_grad():
                    if parameter.ndim > 1 and not parameter.any():
                        parameter.normal_(std=0.05)
                parameter.requires_grad_(False)
                digest.update(parameter.numpy().tobytes())
    backbone.sha256 = digest.hexdigest()
    return backbone


def best_device() -> str:
    """CUDA if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
