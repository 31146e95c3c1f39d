"""PSNR, SSIM and VMAF against values worked out by hand."""

import math

import cv2
import hydra
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fastar.metrics import vmaf as vmaf_module
from fastar.metrics.fidelity import VMAF, FramePSNR, FrameSSIM, frame_psnr, frame_ssim
from fastar.metrics.vmaf import vmaf_frames


def scene(frames: int = 4, height: int = 96, width: int = 128) -> Tensor:
    """A textured picture that moves two pixels a frame: uint8 [F, H, W, 3]."""
    noise = np.random.default_rng(0).random((height, width + 2 * frames, 3))
    texture = cv2.GaussianBlur(noise, (0, 0), 2)
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    pixels = np.stack([texture[:, 2 * f : 2 * f + width] for f in range(frames)])
    return torch.tensor((255 * pixels).round().astype(np.uint8))


def test_psnr_by_hand() -> None:
    black = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)
    other = black.clone()
    other[0, 0] = 51  # a fifth of the range: mean squared error 0.04
    other[0, 1, :8] = 255  # half of the pixels all wrong: 0.5
    expected = torch.tensor([[10 * math.log10(1 / 0.04), 10 * math.log10(1 / 0.5)]])
    torch.testing.assert_close(frame_psnr(other, black), expected)
    as_float = other.movedim(-1, 2).float() / 255
    torch.testing.assert_close(frame_psnr(as_float, black), expected)  # both forms of pixels, mixed
    assert frame_psnr(black, black).tolist() == [[100.0, 100.0]]


def test_psnr_is_a_mean_over_frames_of_all_updates() -> None:
    metric = FramePSNR()
    black = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    metric.update(black[:1] + 51, black[:1])
    metric.update(black[1:] + 255, black[1:])
    assert metric.compute().item() == pytest.approx((10 * math.log10(25) + 0 + 0) / 3)


def test_ssim_of_flat_pictures_by_hand() -> None:
    """Without texture SSIM is its luminance term, (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2."""
    one, other = torch.full((2, 3, 32, 32), 0.2), torch.full((2, 3, 32, 32), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    torch.testing.assert_close(frame_ssim(one, other), torch.full((2,), expected))


def test_ssim_against_the_definition() -> None:
    """A window in the middle, by the formula, with Gaussian weights of sigma 1.5 over 11 x 11."""
    generator = np.random.default_rng(0)
    x, y = generator.random((11, 11)), generator.random((11, 11))
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * x * x).sum() - mean_x**2, (weights * y * y).sum() - mean_y**2
    covariance = (weights * x * y).sum() - mean_x * mean_y
    expected = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    videos = [torch.tensor(side, dtype=torch.float32).expand(1, 3, 11, 11) for side in (x, y)]
    assert frame_ssim(*videos).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_metric_averages() -> None:
    clean = scene()
    metric = FrameSSIM()
    metric.update(clean[None], clean[None])
    metric.update(255 - clean[None, :2], clean[None, :2])
    expected = torch.cat([torch.ones(4), frame_ssim(255 - clean[:2], clean[:2])]).mean()
    torch.testing.assert_close(metric.compute(), expected)


def test_vmaf_ranks_damage() -> None:
    clean = scene()
    noise = torch.randint(-25, 26, clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clean.int() + noise).clamp(0, 255).to(torch.uint8)
    blurred = torch.tensor(np.stack([cv2.GaussianBlur(frame, (0, 0), 2.5) for frame in clean.numpy()]))
    scores = {
        name: vmaf_frames(video, clean)
        for name, video in (("clean", clean), ("noisy", noisy), ("blur", blurred))
    }
    assert all(score.shape == (4,) for score in scores.values())
    assert scores["clean"].mean() > 90
    assert scores["clean"].mean() > scores["noisy"].mean() + 5
    assert scores["clean"].mean() > scores["blur"].mean() + 5
    metric = VMAF()
    metric.update(torch.stack([clean, noisy]), torch.stack([clean, clean]))
    torch.testing.assert_close(metric.compute(), torch.cat([scores["clean"], scores["noisy"]]).mean())


def test_an_ffmpeg_without_libvmaf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "echo")
    vmaf_module.ffmpeg_with_libvmaf.cache_clear()
    with pytest.raises(ValueError, match="has no libvmaf"):
        vmaf_frames(scene(), scene())
    vmaf_module.ffmpeg_with_libvmaf.cache_clear()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8 frames must be"),
        (torch.zeros(2, 16, 16, 3), "float"),
        (torch.full((2, 3, 16, 16), -0.5), r"must lie in \[0, 1\]"),
        (torch.zeros(2, 3, 16, 8), "one shape"),
    ],
)
def test_wrong_pixels_are_refused(video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_psnr(video, torch.zeros(2, 3, 16, 16))


def test_config_makes_the_metrics(repository) -> None:  # type: ignore[no-untyped-def]
    metrics = hydra.utils.instantiate(OmegaConf.load(repository / "conf/metrics/default.yaml"))
    assert {name: type(metric) for name, metric in metrics.items()} == {
        "psnr": FramePSNR,
        "ssim": FrameSSIM,
        "vmaf": VMAF,
    }
