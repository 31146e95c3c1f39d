"""What turns pixels into latents and back, as the rest of the library handles it, frame by frame or with a memory.

An autoencoder of temporal stride s makes latent frame 0 of one pixel frame and every later one of s: n latent frames
show 1 + s (n - 1) pixel frames. One that looks at earlier frames is decoded in order, through a stream that remembers
them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DecodeStream(Protocol):
    """One batch of videos while it is decoded, chunk by chunk from latent frame 0 on."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] of the next latents [B, n, C, h, w]; about [-1, 1], not clamped."""

    def fork(self) -> DecodeStream:
        """A stream that stands where this one stands and goes its own way."""


class VideoCodec(Protocol):
    """Pixels [B, F, 3, H, W] in [-1, 1] to latents [B, n, C, h, w] as the transformer wants them, and back."""

    temporal_stride: int
    fps: float  # of the videos it is made for

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of a video from its first frame on; 1 + temporal_stride (n - 1) frames make n."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of a whole video."""

    def stream(self) -> DecodeStream:
        """A stream at frame 0."""


class FrameStream:
    """The stream of a codec that decodes every frame by itself: there is nothing to remember."""

    def __init__(self, codec: VideoCodec) -> None:
        self.codec = codec

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def fork(self) -> FrameStream:
        return self


def pixel_frames(latent_frames: int, stride: int) -> int:
    """Pixel frames that the first `latent_frames` latent frames of a video show."""
    return 1 + stride * (latent_frames - 1) if latent_frames else 0


def latent_frames(pixels: int, stride: int) -> int:
    """Whole latent frames in the first `pixels` pixel frames of a video."""
    return 1 + (pixels - 1) // stride if pixels else 0
