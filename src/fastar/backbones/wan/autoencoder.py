"""Wan 2.1's autoencoder, that of diffusers, decoded as a stream.

It is causal in time: latent frame 0 shows one pixel frame, every later one four. Latents are normalised channel by
channel with the mean and standard deviation in the config of the weights. diffusers is imported when one is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastar.backbones.pretrained import checksum, read_tensors
from fastar.backbones.resolve import find_weights

STRIDE = 4  # pixel frames of a latent frame after the first
FPS = 16.0
PART, USUAL = "vae", ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
RANDOM = "random"


class WanAutoencoder(nn.Module):
    """diffusers' AutoencoderKLWan behind the interface of `fastar.backbones.codec`.

    Args:
        network: in eval mode, where it shall compute.
        sha256: of its weights.
        fps: of the videos.
    """

    temporal_stride = STRIDE

    def __init__(self, network: Any, *, sha256: str | None = None, fps: float = FPS) -> None:
        super().__init__()
        self.network, self.sha256, self.fps = network, sha256, float(fps)
        if network.config.patch_size is not None:
            raise ValueError("this is Wan 2.2's autoencoder, which cuts pixels into patches: use Wan 2.1's")
        statistics = torch.tensor([network.config.latents_mean, network.config.latents_std])
        mean, std = statistics.to(network.device)[..., None, None]
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    latent_mean: Tensor
    latent_std: Tensor

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fps: float = FPS,
        store: str | Path = "checkpoints",
        cache: str | Path | None = None,
    ) -> WanAutoencoder:
        """From a diffusers folder (its part `vae`), or from the original Wan2.1_VAE.pth or a folder that holds it.

        Args:
            checkpoint: path or hub id (`fastar.backbones.resolve`); `random`: weights that mean nothing, for timings.
            device, dtype: where and in what to compute.
            fps: of the videos.
            store, cache: as in `fastar.backbones.pretrained.load_checkpoint`.

        Raises:
            FileNotFoundError, ValueError: no such weights, damaged ones, ones that do not fit, or no diffusers.
        """
        kind, converted = _diffusers()
        if checkpoint == RANDOM:
            network, sha256 = (
                _random(kind, {}),
                hashlib.sha256(b"random Wan 2.1 autoencoder, seed 0").hexdigest(),
            )
        else:
            found = find_weights(checkpoint, part=PART, usual=USUAL, store=store)
            tensors = read_tensors(found.files)
            if any(name.startswith("decoder.upsamples.") for name in tensors):
                tensors = converted(tensors)
            sizes = {} if found.config is None else json.loads(found.config.read_text(encoding="utf-8"))
            network = _network(kind, sizes, tensors, found.files[0])
            sha256 = checksum(found.files, cache)
        network.requires_grad_(False).eval()
        # not diffusers' own method, which warns of modules that this network has not
        nn.Module.to(network, device, getattr(torch, dtype))
        return cls(network, sha256=sha256, fps=fps)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents (the posterior's mode) [B, 1 + (F - 1) / 4, C, H/8, W/8] of pixels [B, F, 3, H, W].

        Raises:
            ValueError: F - 1 is no multiple of 4, or H or W none of 8.
        """
        if pixels.dim() != 5 or pixels.shape[2] != 3:
            raise ValueError(f"pixels must be [batch, frames, 3, height, width], got {tuple(pixels.shape)}.")
        frames, scale = pixels.shape[1], self.network.spatial_compression_ratio
        if (frames - 1) % STRIDE or any(side % scale for side in pixels.shape[-2:]):
            raise ValueError(
                f"Wan's autoencoder takes 1 + {STRIDE} n frames with sides of whole {scale} pixels, got {frames} of "
                f"{pixels.shape[-2]}x{pixels.shape[-1]}: cut or resize them."
            )
        video = pixels.transpose(1, 2).to(self.network.device, self.network.dtype)
        latents = self.network.encode(video).latent_dist.mode().transpose(1, 2)
        return (latents.float() - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels float32 [B, 1 + 4 (n - 1), 3, 8h, 8w] of a whole video's latents [B, n, C, h, w]."""
        return self.stream().decode(latents)

    def stream(self) -> WanStream:
        """A stream at frame 0."""
        return WanStream(self)


class WanStream:
    """A video while it is decoded: the last features that every causal convolution has seen.

    Latents are decoded one by one, as diffusers does within a call, so that chunks of any size give the same bits.
    """

    def __init__(self, autoencoder: WanAutoencoder, features: list[Any] | None = None) -> None:
        self.autoencoder = autoencoder
        self._features = features

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        codec = self.autoencoder
        mean, std, network = codec.latent_mean, codec.latent_std, codec.network
        if latents.dim() != 5 or latents.shape[2] != len(mean):
            raise ValueError(
                f"latents must be [batch, frames, {len(mean)}, rows, columns], got {tuple(latents.shape)}."
            )
        raw = (latents.to(mean) * std + mean).transpose(1, 2).to(network.dtype)
        parts = []
        for frame in raw.split(1, dim=2):
            hidden, first = network.post_quant_conv(frame), self._features is None
            # a decoder replaces the features in this list and changes none of them: forks may share them
            features = (
                [None] * _convolutions(network.decoder) if self._features is None else list(self._features)
            )
            parts.append(network.decoder(hidden, feat_cache=features, feat_idx=[0], first_chunk=first))
            self._features = features
        return torch.cat(parts, dim=2).transpose(1, 2).float()

    def fork(self) -> WanStream:
        return WanStream(self.autoencoder, self._features)


def _network(kind: Any, sizes: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> Any:
    """The autoencoder of a diffusers config with these weights, whose storage it takes over."""
    try:
        with torch.device("meta"):
            network = kind.from_config(
                {name: value for name, value in sizes.items() if not name.startswith("_")}
            )
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file.parent / 'config.json'} is not that of an AutoencoderKLWan ({error})"
        ) from error
    fill(network, tensors, file, assign=True)
    return network


def fill(network: nn.Module, tensors: dict[str, Tensor], file: Path, *, assign: bool = False) -> None:
    """Load `tensors`, read from `file`; a ValueError says in one sentence what does not fit."""
    try:
        network.load_state_dict(tensors, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise ValueError(f"{file} does not fit {type(network).__name__} ({reason[:200]})") from error


def _random(kind: Any, sizes: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**sizes)


def _convolutions(decoder: nn.Module) -> int:
    """Causal convolutions, each of which has features of its own."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in decoder.modules())


def _diffusers() -> tuple[Any, Any]:
    """AutoencoderKLWan, and what gives the original weights its names."""
    try:
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"Wan's autoencoder needs diffusers ({reason}): pip install -e '.[wan]'") from error
    return AutoencoderKLWan, convert_wan_vae_to_diffusers
