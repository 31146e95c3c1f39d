"""Classifier-free guidance: every pass runs twice as many sequences, those of the prompts first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastar.backbones.prompts import Prompts


@dataclass(frozen=True)
class Guidance:
    """Of a batch of B videos: towards their prompts, away from a negative one, whose sequences have their own cache.

    Attributes:
        scale: the velocity is the negative prompt's plus so many times the difference.
        negative: one prompt for all videos, or one each.
    """

    scale: float
    negative: Prompts

    def texts(self, text: Tensor) -> Tensor:
        """Embeddings [B, L, D] of the prompts, and the negative ones behind them: [2 B, L', D], padded with zeros."""
        away = self.negative.text(text.device, text.dtype).expand(len(text), -1, -1)
        longest = max(text.shape[1], away.shape[1])
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in (text, away)])

    def mixed(self, velocity: Tensor) -> Tensor:
        """The videos' velocity [B, ...] of that of both [2 B, ...]."""
        towards, away = velocity.chunk(2)
        return torch.lerp(away, towards, self.scale)


def guidance_of(
    scale: float | None, negative: Prompts | None, *, width: int | None, videos: int
) -> Guidance | None:
    """Guidance of a loop's `scale`, None without.

    Raises:
        ValueError: a scale without a negative prompt or the other way round, or a prompt of another size.
    """
    if scale is None or negative is None:
        if scale is not None:
            raise ValueError("guidance leads away from a negative prompt: pass one, an empty one will do")
        if negative is not None:
            raise ValueError(
                "this loop has no guidance: leave the negative prompt out, or set rollout.guidance"
            )
        return None
    count, _, found = negative.embeddings.shape
    if found != width or count not in (1, videos):
        raise ValueError(
            f"the negative prompt must be [1 or {videos}, tokens, {width}], got {list(negative.embeddings.shape)}"
        )
    return Guidance(scale, negative)
