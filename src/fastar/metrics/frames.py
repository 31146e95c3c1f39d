"""Pixels as the metrics take them."""

import torch
from torch import Tensor


def unit_frames(video: Tensor) -> Tensor:
    """Frames as float32 [..., 3, H, W] in [0, 1].

    Args:
        video: uint8 [..., H, W, 3] (as stored and shown), or float [..., 3, H, W] in [0, 1].

    Raises:
        ValueError: any other shape or type, or floats outside [0, 1] (a video in [-1, 1], say).
    """
    if video.dtype == torch.uint8:
        if video.ndim < 3 or video.shape[-1] != 3:
            raise ValueError(f"uint8 frames must be [..., H, W, 3], got {tuple(video.shape)}")
        return video.movedim(-1, -3).float() / 255
    if not video.is_floating_point() or video.ndim < 3 or video.shape[-3] != 3:
        raise ValueError(
            f"frames must be uint8 [..., H, W, 3] or float [..., 3, H, W], got {video.dtype} {tuple(video.shape)}"
        )
    low, high = video.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"float frames must lie in [0, 1], these lie in [{low:.3g}, {high:.3g}]: rescale them first"
        )
    return video.float().clamp(0, 1)


def byte_frames(video: Tensor) -> Tensor:
    """Frames as uint8 [..., H, W, 3]; takes what `unit_frames` takes."""
    return unit_frames(video).mul(255).round().byte().movedim(-3, -1).contiguous()


def frame_pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both videos as `unit_frames`; ValueError if their shapes differ."""
    first, second = unit_frames(pred), unit_frames(target)
    if first.shape != second.shape:
        raise ValueError(
            f"videos to compare must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second
