"""What a text encoder hands to a backbone with a text stream: embeddings of prompts, and how long each one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch of videos, one each.

    Attributes:
        embeddings: [B, L, D], as the encoder left them, padded to a common L.
        lengths: int64 [B], tokens of each prompt; what lies beyond is padding.

    Raises:
        ValueError: the shapes do not fit, or a length lies outside 1..L.
    """

    embeddings: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        if len(shape) != 3 or tuple(self.lengths.shape) != shape[:1] or self.lengths.dtype != torch.int64:
            raise ValueError(
                "prompts are embeddings [batch, tokens, width] and int64 lengths [batch], got "
                f"{shape} and {self.lengths.dtype} {tuple(self.lengths.shape)}"
            )
        if not ((self.lengths >= 1) & (self.lengths <= shape[1])).all():
            raise ValueError(f"lengths of prompts must be in 1..{shape[1]}, got {self.lengths.tolist()}")

    def text(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """What the transformer takes, [B, L, D]: padding is zero, as Wan was trained with; it masks nothing."""
        words = torch.arange(self.embeddings.shape[1], device=self.lengths.device) < self.lengths[:, None]
        return (self.embeddings * words[..., None].to(self.embeddings)).to(device, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Both tensors, on the CPU."""
        return {"embeddings": self.embeddings.cpu().clone(), "lengths": self.lengths.cpu().clone()}

    @classmethod
    def from_state(cls, saved: dict[str, Any]) -> Prompts:
        """Inverse of `state_dict`."""
        return cls(saved["embeddings"], saved["lengths"])
