"""Pixels at the edges (uint8, channels last) and inside the models (float in [-1, 1], channels first)."""

import torch
from torch import Tensor


def to_model_range(frames: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, F, 3, H, W] in [-1, 1].

    Raises:
        ValueError: not uint8, or no trailing axis of 3 channels.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames [B, F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    return frames.permute(0, 1, 4, 2, 3).float().div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """float [B, F, 3, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3], clipped and rounded."""
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
