"""What heads need is measured once, and the comparison spends its budget by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from fastar.cache import HeadErrors
from fastar.compare import calibration as calibrate
from fastar.compare.job import compare
from fastar.results import load
from tests.experiments.conftest import command, noise_clips, values

Tiny = Callable[..., DictConfig]


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Head errors of the tiny random backbone (inside the `tiny` fixture's Hydra)."""
    monkeypatch.setattr(calibrate, "load_clips", noise_clips)
    path = tmp_path / "head_errors.json"
    small = [
        "backbone=tiny",
        "data=doom_tiny",
        "checkpoint=random",
        "clips=1",
        "prefill_frames=16",
        "frames=8",
    ]
    calibrate.calibrate(
        compose("calibrate", overrides=[*small, f"output={path}", "kept_frames=[4,8,24]", "every=7"])
    )
    return path


def test_measured_heads_divide_the_budget(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured(tmp_path, monkeypatch)
    errors = HeadErrors.load(path)
    assert errors.frames == (4, 8, 24) and errors.weights
    curves = [curve for layer in errors.errors for curve in layer]
    assert all(first > last for first, *_, last in curves) and max(c[-1] for c in curves) < 1e-9
    methods = "method=[dense,tempcache_int4_headwise,int4_window_headwise,int4_window]"
    compare(tiny(methods, "protocols=[A,B]", "budget_share=0.1", f"head_errors={path}"))
    rows = load(tmp_path / "compare")
    shares = values(rows, "byte_share", protocol="B", method="tempcache_int4_headwise")
    plain = values(rows, "byte_share", protocol="B", method="int4_window")
    assert 0.8 * plain[-1] < shares[-1] <= 1.02 * plain[-1]
    found = {
        name: values(rows, "psnr", protocol="B", method=name)
        for name in ("tempcache_int4_headwise", "int4_window_headwise", "int4_window")
    }
    assert all(len(psnr) == len(found["int4_window"]) > 0 for psnr in found.values())
    assert len({tuple(psnr) for psnr in found.values()}) == 3  # the measurement makes a difference
    assert 0 < values(rows, "recall", protocol="A", method="tempcache_int4_headwise")[0] < 1


def test_measurements_of_other_weights_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured(tmp_path, monkeypatch)
    path.write_text(path.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(ValueError, match="measured on other weights"):
        compare(tiny("method=[dense,int4_window_headwise]", f"head_errors={path}"))


def test_a_missing_measurement_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    ended = command(
        "compare.py", "debug=tiny", "method=[dense,int4_window_headwise]", f"head_errors={tmp_path}/none.json",
        f"paths.outputs={tmp_path}",
    )  # fmt: skip
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "measure it with `python experiments/calibrate.py" in ended.stderr


def test_a_place_that_cannot_be_written_to_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = command(
        "calibrate.py", "backbone=tiny", "checkpoint=random", f"output={tmp_path}/file/errors.json"
    )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "cannot write to" in ended.stderr and "with output=..." in ended.stderr
