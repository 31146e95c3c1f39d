"""Recordings as latents: the map is what it says, files are checked, and real motion is told from noise."""

from pathlib import Path

import pytest
import torch

from fastar.data.recorded import COEFFICIENTS, Recording, latents_of, load_motion, nearest_shares
from fastar.data.video import write_mp4
from tests.benchmark.conftest import scrolling

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from fastar.data.recorded import sha256_of

    path = write_mp4(tmp_path / "0.mp4", scrolling(35, 0), fps=24, crf=12)
    clip = {"file": path.name, "frames": 35, "sha256": sha256_of(path)}
    Recording.write(tmp_path, [clip], (32, 48), {})
    return tmp_path


def test_each_channel_is_one_wave_of_one_plane() -> None:
    grey = torch.full((4, 16, 24, 3), 51, dtype=torch.uint8)
    latents = latents_of(grey, (16, 24))
    assert latents.shape == (1, 16, 2, 3)
    # a constant c has the coefficient c * sqrt(4 * 8 * 8) at frequency 0, and grey has no colour
    torch.testing.assert_close(latents[:, 0], torch.full((1, 2, 3), 0.2 * 16))
    assert latents[:, 1:].abs().max() < 1e-5
    brighter = torch.cat([grey[:2], grey[2:] + 20])
    moved = latents_of(brighter, (16, 24))
    assert moved[0, COEFFICIENTS.index((0, 1, 0, 0))].max() < -0.1  # the wave falls in time
    left = grey.clone()
    left[:, :, 0::8] += 20
    assert latents_of(left, (16, 24))[0, COEFFICIENTS.index((0, 0, 0, 1))].min() > 0.1
    assert latents_of(left, (16, 24))[0, COEFFICIENTS.index((0, 0, 1, 0))].abs().max() < 1e-5


def test_the_map_is_linear_and_leaves_out_what_is_left() -> None:
    a, b = (torch.randint(0, 128, (11, 16, 24, 3), dtype=torch.uint8) for _ in range(2))
    whole = latents_of(a + b, (32, 48))
    assert whole.shape == (2, 16, 4, 6)
    torch.testing.assert_close(whole, latents_of(a, (32, 48)) + latents_of(b, (32, 48)), atol=1e-4, rtol=1e-4)


def test_motion_is_normal_and_never_begun_again(folder: Path) -> None:
    motion = load_motion(folder, (32, 48), CPU)
    assert motion.latents.shape == (8, 16, 4, 6) and motion.distinct == 1.0
    assert motion.latents.float().std((0, 2, 3)).sub(1).abs().max() < 0.02
    assert motion.latents.float().mean((0, 2, 3)).abs().max() < 0.01
    chunk = motion.chunk(3, 3, CPU)
    assert chunk.shape == (1, 3, 16, 4, 6) and torch.equal(chunk[0], motion.latents[3:6].float())
    with pytest.raises(ValueError, match=r"ends after 8 latent frames and 9 are needed: record more"):
        motion.chunk(6, 3, CPU)
    assert len(load_motion(folder, (32, 48), CPU, limit=5).latents) == 5


def test_files_are_those_that_were_recorded(folder: Path) -> None:
    recording = Recording.load(folder)
    assert (recording.frames, recording.latent_frames) == (35, 8)
    write_mp4(folder / "0.mp4", scrolling(35, 1), fps=24)
    with pytest.raises(ValueError, match="is not the file that was recorded"):
        load_motion(folder, (32, 48), CPU)
    with pytest.raises(ValueError, match=r"no recording in .*mode=record"):
        Recording.load(folder / "elsewhere")


def test_motion_is_found_again_and_noise_is_not(folder: Path) -> None:
    motion = load_motion(folder, (64, 96), CPU).latents
    assert nearest_shares(motion, window=3) > 0.3
    assert nearest_shares(torch.randn(motion.shape), window=3) == 0
    still = motion[:1].expand(8, -1, -1, -1)
    assert nearest_shares(still, window=3) == 1
    with pytest.raises(ValueError, match="8 latent frames have none after 8 others"):
        nearest_shares(motion, window=8)
