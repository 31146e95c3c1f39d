"""PSNR on returning pixels only."""

import math

import pytest
import torch

from fastar.metrics.revisit import RevisitPSNR, masked_psnr


def test_only_masked_pixels_count() -> None:
    truth = torch.zeros(3, 2, 16, 16, 3, dtype=torch.uint8)
    video = truth.clone()
    mask = torch.zeros(3, 2, 16, 16, dtype=torch.bool)
    mask[0, 0, :4] = True  # clip 0: 64 pixels of frame 0, wrong by a fifth; the rest does not count
    video[0, 0, :4] = 51
    video[0, 0, 4:] = 200
    video[0, 1] = 255
    mask[1, 0] = True  # clip 1: 256 pixels right, and 64 wrong by all: pooled, not averaged over frames
    mask[1, 1, :4] = True
    video[1, 1, :4] = 255
    expected = torch.tensor([10 * math.log10(25), 10 * math.log10(5), float("nan")])
    torch.testing.assert_close(masked_psnr(video, truth, mask), expected, equal_nan=True)


def test_clips_without_returns_do_not_count() -> None:
    metric = RevisitPSNR()
    truth = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    metric.update(truth + 51, truth, mask)
    metric.update(truth + 255, truth, ~mask)
    metric.update(truth + 255, truth, mask)
    assert metric.per_clip().isnan().tolist() == [False, True, False]
    assert metric.compute().item() == pytest.approx(10 * math.log10(25) / 2)
    metric.reset()
    assert metric.per_clip().numel() == 0


def test_wrong_masks_are_refused() -> None:
    video = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)
    for mask in (torch.ones(1, 2, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool)):
        with pytest.raises(ValueError, match="bool mask"):
            masked_psnr(video, video, mask)
