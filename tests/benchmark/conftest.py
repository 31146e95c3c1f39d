"""A small recording that needs no simulator, and the benchmark's config at a size that takes a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from fastar.data.recorded import Recording, sha256_of
from fastar.data.video import write_mp4


def scrolling(frames: int, seed: int) -> np.ndarray:
    """uint8 [F, 32, 48, 3]: a coarse random picture that moves by a pixel a frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, (frames + 48) // 8 + 1, 3), dtype=np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)
    return np.stack([picture[:, start : start + 48] for start in range(frames)])


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Two clips of 150 and 102 frames: 37 and 25 latent ones, what is left makes none."""
    folder, clips = tmp_path_factory.mktemp("motion"), []
    for number, frames in enumerate((150, 102)):
        path = write_mp4(folder / f"{number}.mp4", scrolling(frames, number), fps=24, crf=12)
        clips.append({"file": path.name, "frames": frames, "sha256": sha256_of(path)})
    return Recording.write(folder, clips, (32, 48), {"simulator": "scrolling"})


@pytest.fixture
def benchmark_config(
    composed: Callable[..., DictConfig], recording: Recording, tmp_path: Path
) -> Callable[..., DictConfig]:
    """`benchmark_config("mode=rollout")`: the tiny stand-in for Wan on the recording."""
    settings = [
        "backbone=tiny_text", "device=cpu", "dtype=float32", "matmul_size=64", "repeats=2", "block_queries=16",
        "block_keys=16", f"motion.folder={recording.folder}", f"output={tmp_path}", "steady.fill_frames=30",
        "steady.warmup=1", "steady.chunks=1", "steady.repeats=2", "budgets=[4]", "decoders=[]", "dense.beside=false",
        "rollout.window.attended_frames=6",
    ]  # fmt: skip
    return lambda *overrides: composed("benchmark", *settings, *overrides)
