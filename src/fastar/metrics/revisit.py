"""Long-range memory against the simulator's truth: PSNR on pixels that return after the recent window forgot them.

The mask comes from pose and depth (`fastar.data.doom.truth.return_masks`). Dense attention is a method here, not the
truth.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fastar.metrics.fidelity import psnr_from_mse
from fastar.metrics.frames import frame_pair


def masked_psnr(pred: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """PSNR in dB of each clip, over all its masked pixels at once: float32 [B]; NaN for a clip without any.

    Pooling over the clip keeps a frame with a handful of returning pixels from weighing as much as a full one.

    Args:
        pred, truth: uint8 [B, F, H, W, 3] or float [B, F, 3, H, W] in [0, 1].
        mask: bool [B, F, H, W], True on pixels that count.
    """
    first, second = frame_pair(pred, truth)
    expected = (*first.shape[:-3], *first.shape[-2:])
    if first.ndim != 5 or mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(
            f"need videos [B, F, ...] and a bool mask [B, F, H, W], got {tuple(first.shape)} "
            f"and {mask.dtype} {tuple(mask.shape)}"
        )
    error = (first - second).square().mean(dim=2).double() * mask
    mse = error.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    return psnr_from_mse(mse).float()


class RevisitPSNR(Metric):
    """Mean over clips of `masked_psnr`. Clips without returning pixels do not count; `per_clip` keeps them as NaN."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    clips: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("clips", default=[], dist_reduce_fx="cat")

    def update(self, pred: Tensor, truth: Tensor, mask: Tensor) -> None:
        """Add whole clips, as `masked_psnr` takes them."""
        assert isinstance(self.clips, list)
        self.clips.append(masked_psnr(pred, truth, mask))

    def per_clip(self) -> Tensor:
        """PSNR of every clip in the order of the updates, for paired comparisons: [N]."""
        if len(self.clips) == 0:
            return torch.zeros(0, device=self.device)
        values: Tensor = dim_zero_cat(self.clips)
        return values

    def compute(self) -> Tensor:
        """Mean over the clips that have returning pixels; NaN if none has."""
        return self.per_clip().nanmean()
