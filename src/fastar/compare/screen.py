"""Pixels of rollouts, chunk by chunk: where an autoencoder looks at earlier frames, each chunk follows on those."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.backbones.codec import DecodeStream, pixel_frames
from fastar.compare.latents import LatentClips
from fastar.data.pixels import to_uint8
from fastar.rollout.rollout import PassTimer

if TYPE_CHECKING:
    from fastar.compare.clips import AnyClips
    from fastar.compare.prompted import PromptedClip
    from fastar.compare.session import Session


class Screen:
    """Where one batch of videos is shown, from the first frame after their given beginning on.

    Clips of latents alone have no pixels: nothing is decoded, and all that would be shown is None.

    Args:
        session: decodes.
        clips: says what is given.

    Attributes:
        frame: latent frame that comes next.
    """

    def __init__(self, session: Session, clips: AnyClips | PromptedClip) -> None:
        self.session, self.frame = session, clips.prefill
        self._stream: DecodeStream | None = None
        if not isinstance(clips, LatentClips):
            self._stream = session.eyes().stream()
            if clips.prefill and session.stride > 1:
                self._decoded(self._stream, session.beginning(clips))

    def frames_of(self, count: int) -> int:
        """Frames of the video that the next `count` latent frames make; without pixels latent frames are counted."""
        stride = 1 if self._stream is None else self.session.stride
        return pixel_frames(self.frame + count, stride) - pixel_frames(self.frame, stride)

    def show(self, latents: Tensor, timer: PassTimer | None = None) -> Tensor | None:
        """The next chunk, latents [B, n, C, h, w], as uint8 [B, F, H, W, 3] on the CPU; decoding it is timed."""
        self.frame += latents.shape[1]
        if self._stream is None:
            return None
        with timer.measure("decode") if timer is not None else nullcontext():
            return self._decoded(self._stream, latents)

    def preview(self, latents: Tensor) -> Tensor | None:
        """As `show`, but what comes next stays what it was."""
        return None if self._stream is None else self._decoded(self._stream.fork(), latents)

    def follow(self, trajectory: Tensor, frame: int, first: int = 0) -> None:
        """Have latent frame `frame` come next, after those of `trajectory` [B, F, C, h, w], which begins at `first`."""
        if self.session.stride > 1 and self._stream is not None and frame > self.frame:
            self._decoded(self._stream, trajectory[:, self.frame - first : frame - first])
        self.frame = max(frame, self.frame)

    @torch.inference_mode()
    def _decoded(self, stream: DecodeStream, latents: Tensor) -> Tensor:
        return to_uint8(stream.decode(latents.to(self.session.device))).cpu()


def joined(shown: Sequence[Tensor | None]) -> Tensor | None:
    """Chunks of a screen as one video; None without pixels."""
    pixels = [chunk for chunk in shown if chunk is not None]
    return torch.cat(pixels, 1) if pixels else None


def pixel_part(first: int, count: int, prefill: int, stride: int) -> slice:
    """Pixel frames of the latent frames from `first` on, counted from the end of the first `prefill` latent frames."""
    start, given = pixel_frames(first, stride), pixel_frames(prefill, stride)
    return slice(start - given, pixel_frames(first + count, stride) - given)
