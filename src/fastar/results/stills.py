"""A few frames of a run's video, small enough to be kept with its numbers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastar.data.video import read_mp4, save_png

STILLS, TRUTH = "stills.png", "stills_truth.png"
VIDEOS = {STILLS: "generated_seed*.mp4", TRUTH: "truth_seed*.mp4"}


def still_frames(frames: int, count: int) -> list[int]:
    """Which of `frames` frames are shown, evenly spread, first and last included."""
    return np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist()


def write_stills(run: Path, copy: Path, count: int, height: int) -> None:
    """Put `count` frames of the first video that `run` kept, and of the truth, side by side into pictures in `copy`.

    Frames are reduced by a whole factor to no less than `height` lines, in 256 colours. Without a video nothing is
    written.
    """
    for name, pattern in VIDEOS.items():
        for video in sorted((run / "videos").glob(pattern))[:1]:
            frames = read_mp4(video).numpy()
            strip = Image.fromarray(np.concatenate([frames[n] for n in still_frames(len(frames), count)], 1))
            save_png(copy / name, strip.reduce(max(1, strip.height // height)))


def read_stills(path: Path, count: int) -> NDArray[np.uint8]:
    """The frames of a picture that `write_stills` wrote, [count, H, W, 3].

    Raises:
        ValueError: it does not hold so many.
    """
    with Image.open(path) as picture:
        strip = np.asarray(picture.convert("RGB"))
    if strip.shape[1] % count:
        raise ValueError(
            f"{path} is {strip.shape[1]} pixels wide, not {count} frames: record it with stills={count}"
        )
    return np.stack(np.split(strip, count, axis=1))
