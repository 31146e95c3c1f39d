"""Light decoders that a user brings along (TAEHV and the like), in place of Wan's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastar.backbones.codec import DecodeStream, pixel_frames
from fastar.backbones.pretrained import checksum, read_tensors
from fastar.backbones.resolve import find_weights
from fastar.backbones.wan.autoencoder import FPS, STRIDE, WanAutoencoder, fill


class LightDecoder(Protocol):
    """What a light decoder (TAEHV and the like) has to offer: an nn.Module with these two methods.

    It maps latents as the transformer makes them (normalised; undo that inside if it was trained on others) to pixels
    in [-1, 1]: one frame for latent frame 0, four for every later one. What it remembers of earlier latents is a value
    that it returns and never changes in place: streams are forked by sharing it.
    """

    def start(self) -> Any:
        """What is remembered before latent frame 0."""

    def decode(self, latents: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Pixels [B, F, 3, H, W] of the next latents [B, n, C, h, w], and what is remembered after them."""


class LightAutoencoder(nn.Module):
    """A user's light decoder in place of Wan's own; start images are encoded by Wan's encoder, if there is one.

    Args:
        decoder: see `LightDecoder`; Hydra makes it from its `_target_`, without weights.
        checkpoint: path or hub id of its state dict; None: it comes with its weights.
        encoder: what encodes; None: nothing can be.
        device, dtype, fps, store, cache: as in `WanAutoencoder.load`.

    Raises:
        FileNotFoundError, ValueError: no such weights, damaged ones, ones that do not fit, or no such methods.
    """

    temporal_stride = STRIDE

    def __init__(
        self,
        decoder: Any,
        *,
        checkpoint: str | Path | None = None,
        encoder: WanAutoencoder | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fps: float = FPS,
        store: str | Path = "checkpoints",
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        absent = [
            name
            for name in ("start", "decode", "load_state_dict")
            if not callable(getattr(decoder, name, None))
        ]
        if absent:
            raise ValueError(
                "a light decoder is an nn.Module with the methods start and decode "
                f"(fastar.backbones.wan.light_decoder); {type(decoder).__name__} has no {absent[0]}"
            )
        self.fps, self.encoder = float(fps), None if encoder is None else encoder.to(device)
        self.compute_dtype, self.device = getattr(torch, dtype), torch.device(device)
        if checkpoint is None:
            sums = [
                hashlib.sha256(t.detach().cpu().float().numpy().tobytes())
                for t in decoder.state_dict().values()
            ]
            weights = hashlib.sha256("".join(s.hexdigest() for s in sums).encode()).hexdigest()
        else:
            found = find_weights(checkpoint, part="decoder", store=store)
            fill(decoder, read_tensors(found.files), found.files[0])
            weights = checksum(found.files, cache)
        named = [type(decoder).__qualname__, weights, None if encoder is None else encoder.sha256]
        self.sha256 = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        self.decoder = decoder.requires_grad_(False).eval().to(self.device, self.compute_dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """As Wan's encoder.

        Raises:
            ValueError: there is none.
        """
        if self.encoder is None:
            raise ValueError(
                "this light decoder cannot encode a start image or video: set autoencoder.encoder to Wan's autoencoder"
            )
        return self.encoder.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels float32 [B, 1 + 4 (n - 1), 3, H, W] of a whole video's latents [B, n, C, h, w]."""
        return self.stream().decode(latents)

    def stream(self) -> DecodeStream:
        """A stream at frame 0."""
        return LightStream(self, 0, self.decoder.start())


class LightStream:
    """A video while a light decoder decodes it: `frames` latent frames so far, and what it remembers of them."""

    def __init__(self, autoencoder: LightAutoencoder, frames: int, memory: Any) -> None:
        self.autoencoder, self.frames, self.memory = autoencoder, frames, memory

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        codec = self.autoencoder
        pixels, self.memory = codec.decoder.decode(latents.to(codec.device, codec.compute_dtype), self.memory)
        after = self.frames + latents.shape[1]
        wanted = pixel_frames(after, STRIDE) - pixel_frames(self.frames, STRIDE)
        if pixels.dim() != 5 or pixels.shape[1] != wanted or pixels.shape[2] != 3:
            raise ValueError(
                f"the light decoder {type(codec.decoder).__name__} made {tuple(pixels.shape)} of latent frames "
                f"{self.frames} to {after - 1}: they are {wanted} pixel frames, [batch, {wanted}, 3, height, width]"
            )
        self.frames = after
        return pixels.float()

    def fork(self) -> LightStream:
        return LightStream(self.autoencoder, self.frames, self.memory)
