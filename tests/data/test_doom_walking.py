"""Recordings of a simulated camera: they never stand still, never repeat, and can be made again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastar.data.doom.maps import make_world
from fastar.data.doom.walking import record, walk_frames
from fastar.data.recorded import load_motion

pytest.importorskip("vizdoom", reason="the Doom engine is not installed: pip install -e '.[doom]'")


def test_a_recording_is_distinct_frames_of_several_worlds(tmp_path: Path) -> None:
    recording = record(tmp_path, frames=20, clip_frames=12, frame_size=(48, 64))
    assert [clip["frames"] for clip in recording.clips] == [12, 8]
    motion = load_motion(tmp_path, (96, 128), torch.device("cpu"))
    assert motion.latents.shape == (5, 16, 12, 16) and motion.distinct == 1.0
    again = record(tmp_path / "again", frames=20, clip_frames=12, frame_size=(48, 64))
    assert again.sha256 == recording.sha256
    assert record(tmp_path / "other", frames=12, frame_size=(48, 64), seed=1).sha256 != recording.sha256


def test_frames_between_two_poses_are_on_the_way() -> None:
    frames = np.stack(list(walk_frames(make_world(3), 24, seed=0, frame_size=(192, 256)))).astype(float)
    assert frames.shape == (24, 192, 256, 3)
    steps = np.abs(frames[1:] - frames[:-1]).mean((1, 2, 3))
    over_two = np.abs(frames[2::2] - frames[:-2:2]).mean((1, 2, 3))
    assert steps.min() > 0
    assert np.median(steps) < np.median(over_two)


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most \[192, 256\]"):
        record(tmp_path, frames=8, frame_size=(240, 320))
    with pytest.raises(ValueError, match="frames >= 1"):
        record(tmp_path, frames=0)
