"""The sign of the optical flow tells left turns from right ones."""

import sys

import pytest
import torch
from torch import Tensor

from fastar.metrics.flow import LEFT, RIGHT, TurnAgreement, horizontal_flow
from fastar.metrics.names import METRICS, unit_of


def panning(step: int, frames: int = 4, *, seed: int = 0) -> Tensor:
    """A textured picture whose content moves `step` pixels a frame to the right: uint8 [F, 96, 128, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 24, 64, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(96, 256), mode="bicubic").clamp(0, 1)[0]
    views = [picture[:, :, 64 - step * f : 192 - step * f] for f in range(frames)]
    return (torch.stack(views) * 255).to(torch.uint8).movedim(1, -1)


@pytest.mark.parametrize("step", [-6, -2, 3, 8])
def test_flow_of_a_pan(step: int) -> None:
    pytest.importorskip("cv2")
    flow = horizontal_flow(panning(step))
    assert flow.shape == (3,)
    assert torch.allclose(flow, torch.full((3,), float(step)), atol=0.35 * abs(step))


def test_turning_left_moves_the_picture_right() -> None:
    pytest.importorskip("cv2")
    clips = torch.stack([panning(5), panning(-5, seed=1), panning(5, seed=2), panning(0)])
    metric = TurnAgreement()
    metric.update(clips, torch.tensor([LEFT, RIGHT, RIGHT, LEFT]))  # right, right, wrong, no turn at all
    assert metric.compute().item() == 0.5
    with pytest.raises(ValueError, match="direction must hold"):
        metric.update(clips, torch.tensor([0, 1, 1, 1]))


def test_missing_opencv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="needs OpenCV"):
        horizontal_flow(panning(1))


def test_metric_names_have_units() -> None:
    assert unit_of("psnr") == "dB" and unit_of("fps/steady") == "1/s" and unit_of("unheard_of") == ""
    assert all(info.meaning and info.better in ("higher", "lower", "") for info in METRICS.values())
