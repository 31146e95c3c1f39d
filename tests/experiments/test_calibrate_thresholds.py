"""What thresholds cost every layer is measured once, and caches choose theirs by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from fastar.cache import ThresholdErrors
from fastar.compare import threshold_calibration
from fastar.compare.job import compare
from fastar.compare.threshold_calibration import calibrate_thresholds
from fastar.results import load
from tests.experiments.conftest import noise_clips, values

Tiny = Callable[..., DictConfig]


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Threshold errors of the tiny random backbone (inside the `tiny` fixture's Hydra)."""
    monkeypatch.setattr(threshold_calibration, "load_clips", noise_clips)
    path = tmp_path / "threshold_errors.json"
    small = ["backbone=tiny", "data=doom_tiny", "checkpoint=random", "clips=1", "frames=12", f"output={path}"]
    calibrate_thresholds(
        compose("calibrate_thresholds", overrides=[*small, "thresholds=[0.7,0.1,2.0]", "every=5", *more])
    )
    return path


def test_measured_errors_choose_the_thresholds(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured(tmp_path, monkeypatch)
    assert "layer 1" in capsys.readouterr().out
    found = ThresholdErrors.load(path)
    assert found.thresholds == (0.1, 0.7, 2.0) and found.weights and found.settings["match_space"] == "raw"
    for layer in range(found.num_layers):
        slots, errors = found.slots[layer], found.errors["measured"][layer]
        assert slots[0] < slots[2] == 1, "nothing merges from 2 on"
        assert errors[0] > 0.05 and errors[2] < 0.01, "bfloat16 slots alone"
        assert all(a <= b + 1e-4 for a, b in zip(errors, found.errors["bound"][layer], strict=True))
    methods = ["method=[dense,tempcache_paper,tempcache_paper_error]", "protocols=[A]", "frames=8"]
    methods += ["methods.tempcache_paper.cache.threshold=0.1", f"threshold_errors={path}"]
    compare(tiny(*methods, "methods.tempcache_paper_error.cache.error_target=0.011"))
    rows = load(tmp_path / "compare")
    for metric in ("slot_share", "output_error"):
        loose, strict = (
            values(rows, metric, method=name)[-1] for name in ("tempcache_paper", "tempcache_paper_error")
        )
        assert (strict > loose) == (metric == "slot_share"), metric


def test_other_weights_and_wrong_settings_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured(tmp_path, monkeypatch, "thresholds=[0.5]")
    method = "method=[dense,tempcache_paper_error]"
    path.write_text(path.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(ValueError, match=r"measured on other weights.*calibrate_thresholds\.py"):
        compare(tiny(method, f"threshold_errors={path}"))
    for wrong in ("frames=18", "frames=4", "looks=0"):
        with pytest.raises(ValueError, match="must be a whole number of 4-frame chunks, at least two"):
            measured(tmp_path, monkeypatch, wrong)
    for wrong in ("thresholds=[0.5,0.5]", "thresholds=[]", "cache=window"):
        with pytest.raises(ValueError, match="must be different numbers, and the cache one that merges"):
            measured(tmp_path, monkeypatch, wrong)
