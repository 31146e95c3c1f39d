"""Recordings of a camera that walks on and on: thousands of frames of real motion, none shown twice on purpose.

Each clip is a walk through a fresh world, 24 frames a second, that never stands still. Rooms are crossed by way of
random points, so that things come back into view from other places. What is measured on real motion
(`experiments/benchmark.py`) reads recordings through `fastar.data.recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastar.data.doom.camera import HEADINGS
from fastar.data.doom.env import DoomWorlds
from fastar.data.doom.maps import World, make_world
from fastar.data.doom.policy import Walk, random_start, wander
from fastar.data.recorded import Recording, sha256_of
from fastar.data.video import write_mp4

FPS = 24
BETWEEN = 2  # frames a step of the camera (12 a second), which moves 16 units or turns 7.5 degrees


def record(
    folder: str | Path,
    *,
    frames: int,
    clip_frames: int = 576,
    frame_size: tuple[int, int] = (192, 256),
    crf: int = 20,
    seed: int = 0,
) -> Recording:
    """Render `frames` frames and write them to `folder`, one H.264 file for every world of `clip_frames`.

    Args:
        folder: made if it is not there; files of an earlier recording are written over.
        frames: of all clips; the last clip may be shorter.
        clip_frames: of a walk through one world.
        frame_size: (height, width), even, at most 192 x 256.
        crf: x264's quality; 20 takes about 2 KB a frame of 192 x 256.
        seed: of worlds and walks.

    Raises:
        ValueError: fewer than one frame, or a size that the engine does not draw.
    """
    if frames < 1 or clip_frames < BETWEEN:
        raise ValueError(
            f"a recording needs frames >= 1 and clip_frames >= {BETWEEN}, got {frames}, {clip_frames}"
        )
    if not (0 < frame_size[0] <= 192 and 0 < frame_size[1] <= 256):
        raise ValueError(f"frame_size must be at most [192, 256], got {list(frame_size)}")
    folder, clips = Path(folder), []
    for number, start in enumerate(range(0, frames, clip_frames)):
        name, count = f"{number:04d}.mp4", min(clip_frames, frames - start)
        pictures = np.stack(list(walk_frames(make_world(_seed(seed, number)), count, seed, frame_size)))
        write_mp4(folder / name, pictures, fps=FPS, crf=crf)
        clips.append({"file": name, "frames": count, "sha256": sha256_of(folder / name)})
    source = {"simulator": "doom", "seed": seed, "clip_frames": clip_frames, "crf": crf, "fps": FPS}
    return Recording.write(folder, clips, frame_size, source)


def walk_frames(
    world: World, frames: int, seed: int, frame_size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    """The pictures [H, W, 3] of a walk through `world`."""
    rng = np.random.default_rng([seed, world.seed, 2])
    walk = Walk(world, random_start(world, rng), -(-frames // BETWEEN) + 1)
    while not walk.full:
        wander(walk, rng)
    with DoomWorlds([world], frame_size=frame_size) as engine:
        engine.enter(0, walk.poses[0])
        for number in range(frames):
            yield engine.look(*_between(walk, number)).image


def _between(walk: Walk, number: int) -> tuple[int, int, float]:
    """Where frame `number` of a walk is seen from: on the way from one pose to the next."""
    step, part = divmod(number, BETWEEN)
    before, after, share = walk.poses[step], walk.poses[step + 1], part / BETWEEN
    turn = (after.heading - before.heading + HEADINGS // 2) % HEADINGS - HEADINGS // 2
    x, y = (round(a + share * (b - a)) for a, b in zip(before[:2], after[:2], strict=True))
    return x, y, before.degrees + share * turn * 360.0 / HEADINGS


def _seed(seed: int, number: int) -> int:
    """Worlds of different recordings never meet."""
    return (seed << 40) + (1 << 39) + number
