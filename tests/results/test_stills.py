"""A few frames of a video, kept with the numbers of its run."""

from pathlib import Path

import numpy as np
import pytest

from fastar.data.video import upscale, write_mp4
from fastar.results import RunStore
from fastar.results.archive import ARCHIVE
from fastar.results.loading import find_runs
from fastar.results.record import record_runs
from fastar.results.stills import STILLS, TRUTH, read_stills, still_frames


def test_frames_are_spread_over_the_whole_video() -> None:
    assert still_frames(160, 8)[:2] == [0, 23] and still_frames(160, 8)[-1] == 159
    assert still_frames(3, 8) == [0, 1, 2]


def test_stills_are_recorded_and_read_back(tmp_path: Path) -> None:
    """Grey levels that rise with the frame: each still is the frame that it should be."""
    levels = np.arange(20, 220, 10, dtype=np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (20, 48, 64, 3))
    store = RunStore(tmp_path, "sweep")
    with store.open({}, seed=0) as run:
        run.log({"psnr": 1.0}, chunk=0, frame=4)
        write_mp4(run.videos / "generated_seed3.mp4", upscale(video, 4), crf=12)
    with store.open({}, seed=1) as bare:
        bare.log({"psnr": 1.0}, chunk=0, frame=4)
    record_runs(tmp_path / "sweep", tmp_path / "kept", stills=5)
    for path in (tmp_path / "kept").rglob(STILLS):
        path.unlink()
    for folder in {path.parent for path in (tmp_path / "kept").rglob("summary.json")}:
        (folder / "summary.json").unlink()  # as in a clone: only the archive is there
    assert (tmp_path / "kept" / ARCHIVE).exists()
    runs = {summary["seed"]: folder for folder, summary in find_runs(tmp_path / "kept")}
    stills = read_stills(runs[0] / STILLS, 5)
    assert stills.shape == (5, 48, 64, 3)
    assert np.abs(stills.mean((1, 2, 3)) - levels[still_frames(20, 5)]).max() < 3
    assert not (runs[0] / TRUTH).exists() and not (runs[1] / STILLS).exists()
    with pytest.raises(ValueError, match="320 pixels wide, not 7 frames"):
        read_stills(runs[0] / STILLS, 7)
