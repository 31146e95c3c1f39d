"""A small convolutional autoencoder, frame by frame: the latent space of the world models trained here.

Each stage works at 1/2, 1/4 or 1/8 of the frame and changes scale by pixel (un)shuffle, so no layer runs at
full size and no upsampled pixels are convolved: most of the work is at 1/8 and 1/4, which keeps decoding
cheap on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastar.backbones.codec import FrameStream

SCALE = 8  # pixels per latent, in each direction
GROUP_SIZE = 16  # channels per normalisation group


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Widths and residual blocks at 1/2, 1/4 and 1/8 of the frame. Widths must be multiples of 16."""

    latent_channels: int = 16
    encoder_widths: tuple[int, int, int] = (32, 64, 128)
    encoder_blocks: tuple[int, int, int] = (1, 1, 1)
    decoder_widths: tuple[int, int, int] = (32, 64, 128)
    decoder_blocks: tuple[int, int, int] = (1, 3, 1)

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks"):
            value = tuple(getattr(self, name))  # YAML and JSON hold lists
            object.__setattr__(self, name, value)
            if len(value) != 3:
                raise ValueError(
                    f"{name} needs three numbers, for 1/2, 1/4 and 1/8 of the frame; got {value}."
                )
        for width in (*self.encoder_widths, *self.decoder_widths):
            if width < GROUP_SIZE or width % GROUP_SIZE:
                raise ValueError(f"Autoencoder widths must be multiples of {GROUP_SIZE}, got {width}.")


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); the last convolution starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        *before, last = *_norm_conv(width, width), *_norm_conv(width, width)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*before, last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Unpatch(nn.Conv2d):
    """One linear map from each latent to the pixels of its 8x8 patch."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__(latent_channels, 3 * SCALE**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(super().forward(x), SCALE)


class LinearPlus(nn.Module):
    """A linear map of 8x8 patches plus a network that starts at zero and learns what the linear map misses."""

    def __init__(self, linear: nn.Conv2d, network: nn.Sequential) -> None:
        super().__init__()
        self.linear, self.network = linear, network
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.network(x)


class Autoencoder(nn.Module):
    """Frames to latents at 1/8 of their size, and back.

    `encode_raw` and `decode_raw` are the bare networks, for training. `encode` and `decode` work in latents
    normalised to mean 0, standard deviation 1 per channel by the statistics given to `set_latent_statistics`,
    which are buffers and travel with the weights.
    """

    latent_mean: Tensor
    latent_std: Tensor
    temporal_stride = 1
    fps = 12.0

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        half, quarter, eighth = config.encoder_widths
        blocks = [[ResidualBlock(w) for _ in range(n)] for w, n in _stages(config, "encoder")]
        network = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * 3, half, 3, padding=1),
            *blocks[0],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * half, quarter, 1),
            *blocks[1],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * quarter, eighth, 1),
            *blocks[2],
            *_norm_conv(eighth, config.latent_channels),
        )
        self.encoder = LinearPlus(nn.Conv2d(3, config.latent_channels, SCALE, stride=SCALE), network)
        half, quarter, eighth = config.decoder_widths
        blocks = [[ResidualBlock(w) for _ in range(n)] for w, n in _stages(config, "decoder")]
        network = nn.Sequential(
            nn.Conv2d(config.latent_channels, eighth, 3, padding=1),
            *blocks[2],
            nn.Conv2d(eighth, 4 * quarter, 1),
            nn.PixelShuffle(2),
            *blocks[1],
            nn.Conv2d(quarter, 4 * half, 1),
            nn.PixelShuffle(2),
            *blocks[0],
            *_norm_conv(half, 4 * 3),
            nn.PixelShuffle(2),
        )
        self.decoder = LinearPlus(Unpatch(config.latent_channels), network)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents [B, F, C, H/8, W/8] of pixels [B, F, 3, H, W] in [-1, 1]."""
        mean, std = self._statistics()
        return (self.encode_raw(pixels) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, 8h, 8w] of normalised latents [B, F, C, h, w]; about [-1, 1], not clamped."""
        self._check_latents(latents)
        mean, std = self._statistics()
        return _each_frame(self.decoder, latents.to(mean.dtype) * std + mean)

    def stream(self) -> FrameStream:
        """Decodes chunk by chunk; as frames know nothing of each other, that is `decode`."""
        return FrameStream(self)

    def encode_raw(self, pixels: Tensor) -> Tensor:
        """Latents as the encoder gives them, [B, F, C, H/8, W/8]; shapes as in `encode`."""
        if pixels.dim() != 5 or pixels.shape[2] != 3:
            raise ValueError(f"pixels must be [batch, frames, 3, height, width], got {tuple(pixels.shape)}.")
        height, width = pixels.shape[-2:]
        if height % SCALE or width % SCALE:
            raise ValueError(
                f"Frames must be multiples of {SCALE} pixels on each side, got {height}x{width}; resize them."
            )
        return _each_frame(self.encoder, pixels)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, 8h, 8w] of latents as `encode_raw` gives them."""
        self._check_latents(latents)
        return _each_frame(self.decoder, latents)

    @torch.no_grad()
    def fit_linear(self, pixels: Tensor) -> None:
        """Start the linear parts as the principal components of the 8x8 patches of pixels [N, 3, H, W] in [-1, 1].

        This alone is the best linear autoencoder of its size: training starts from there instead of from noise.
        """
        patches = nn.functional.unfold(pixels.float(), SCALE, stride=SCALE).transpose(1, 2).flatten(0, 1)
        mean = patches.mean(0)
        _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis = vectors.flip(1)[:, : self.config.latent_channels].T  # [C, 192], strongest first
        basis = (
            basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        )  # the sign is arbitrary: fix it
        for linear, weight, bias in (
            (self.encoder.linear, basis, -basis @ mean),
            (self.decoder.linear, basis.T, mean),
        ):
            linear.weight.copy_(weight.reshape(linear.weight.shape))
            assert linear.bias is not None
            linear.bias.copy_(bias)

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Fix the normalisation to the means and (positive) standard deviations of raw latents, [C] each."""
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.latent_mean.shape or not torch.isfinite(value).all():
                raise ValueError(
                    f"Latent {name} must be {self.config.latent_channels} finite numbers, got {value}."
                )
        if not (std > 0).all():
            raise ValueError(
                "A latent channel is constant (std 0): train the autoencoder before measuring its latents."
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.dim() != 5 or latents.shape[2] != channels:
            raise ValueError(
                f"latents must be [batch, frames, {channels}, rows, columns], got {tuple(latents.shape)}."
            )

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.latent_mean[:, None, None], self.latent_std[:, None, None]


def _stages(config: AutoencoderConfig, half: str) -> list[tuple[int, int]]:
    return list(zip(getattr(config, f"{half}_widths"), getattr(config, f"{half}_blocks"), strict=True))


def _norm_conv(width: int, out_width: int) -> tuple[nn.GroupNorm, nn.SiLU, nn.Conv2d]:
    return nn.GroupNorm(width // GROUP_SIZE, width), nn.SiLU(), nn.Conv2d(width, out_width, 3, padding=1)


def _each_frame(network: nn.Module, video: Tensor) -> Tensor:
    """Run a 2-D network over the frames of [B, F, C, H, W], channels last: the faster layout."""
    frames = video.flatten(0, 1).to(next(network.parameters()).dtype)
    return network(frames.contiguous(memory_format=torch.channels_last)).unflatten(0, video.shape[:2])
