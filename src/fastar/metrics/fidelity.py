"""Distance to a reference video of the same seed: PSNR, SSIM and VMAF, frame by frame."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fastar.metrics.frames import frame_pair
from fastar.metrics.vmaf import vmaf_frames

MAX_DB = 100.0
"""PSNR given to (nearly) equal frames, so that means over frames stay finite: a mean squared error of 1e-10."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]


def psnr_from_mse(mse: Tensor) -> Tensor:
    """Mean squared error of pixels in [0, 1] -> dB, at most `MAX_DB`."""
    return -10 * torch.log10(mse.clamp(min=10 ** (-MAX_DB / 10)))


def frame_psnr(pred: Tensor, target: Tensor) -> Tensor:
    """PSNR of each frame in dB, over all pixels and channels: [..., F], capped at `MAX_DB`.

    `pred`, `target`: uint8 [..., F, H, W, 3] or float [..., F, 3, H, W] in [0, 1].
    """
    first, second = frame_pair(pred, target)
    return psnr_from_mse((first - second).square().mean(dim=(-3, -2, -1)))


def frame_ssim(pred: Tensor, target: Tensor) -> Tensor:
    """SSIM of each frame: [..., F]. Wang et al. 2004: Gaussian window (11 x 11, sigma 1.5), mean over all windows that
    lie inside the frame, and over channels.

    Takes what `frame_psnr` takes; frames must be at least 11 x 11.
    """
    first, second = frame_pair(pred, target)
    if min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least 11 x 11 pixels, got {first.shape[-2]} x {first.shape[-1]}"
        )
    # float64: variances are differences of squares, and nearly vanish on flat pictures
    x, y = first.double(), second.double()
    mean_x, mean_y = _window_means(x), _window_means(y)
    variances = _window_means(x * x) - mean_x * mean_x + _window_means(y * y) - mean_y * mean_y
    covariance = _window_means(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (luminance * structure).mean(dim=(-3, -2, -1)).float()


def _window_means(pictures: Tensor) -> Tensor:
    """Gaussian-weighted mean of each window inside the picture: [..., H, W] -> [..., H - 10, W - 10].

    Two banded matrix products: many times faster on a CPU than a convolution of each channel.
    """
    rows, columns = (_window_weights(side, pictures) for side in pictures.shape[-2:])
    return rows @ pictures @ columns.mT


def _window_weights(side: int, like: Tensor) -> Tensor:
    """[side - 10, side]: row i holds the weights of the window that starts at i."""
    offset = torch.arange(SSIM_WINDOW, dtype=like.dtype, device=like.device) - SSIM_WINDOW // 2
    taps = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    weights = like.new_zeros(side - SSIM_WINDOW + 1, side)
    for tap, weight in enumerate((taps / taps.sum()).unbind()):
        weights.diagonal(tap)[:] = weight
    return weights


class _FrameMean(Metric):
    """Mean of a per-frame score over all frames seen."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        self.total += scores.double().sum()
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """Mean over frames, float32; NaN before any update."""
        return (self.total / self.count).float()


class FramePSNR(_FrameMean):
    """Mean over frames of `frame_psnr`, in dB."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add videos uint8 [..., F, H, W, 3] or float [..., F, 3, H, W] in [0, 1]."""
        self._add(frame_psnr(pred, target))


class FrameSSIM(_FrameMean):
    """Mean over frames of `frame_ssim`."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add videos uint8 [..., F, H, W, 3] or float [..., F, 3, H, W] in [0, 1]."""
        self._add(frame_ssim(pred, target))


class VMAF(_FrameMean):
    """Mean over frames of VMAF, 0 to 100; see `fastar.metrics.vmaf`. Runs ffmpeg once per clip."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add videos uint8 [B, F, H, W, 3] or [F, H, W, 3], or float with channels before H and W."""
        first, second = frame_pair(pred, target)
        clips = zip(first.reshape(-1, *first.shape[-4:]), second.reshape(-1, *second.shape[-4:]), strict=True)
        for one, other in clips:
            self._add(vmaf_frames(one, other).to(self.total.device))
