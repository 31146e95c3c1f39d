"""VMAF (Netflix, model vmaf_v0.6.1) through an ffmpeg with libvmaf, as the imageio-ffmpeg wheel ships one."""

import json
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastar.metrics.frames import byte_frames, frame_pair

MIN_SIDE = 64
"""VMAF's features are taken at four scales; below this many pixels a side libvmaf's scores mean nothing."""


def vmaf_frames(pred: Tensor, target: Tensor, *, threads: int = 1) -> Tensor:
    """VMAF of each frame of one clip, 0 to 100: float32 [F] on the CPU.

    The motion feature looks at the previous frame, so frames must be consecutive. VMAF was fitted to HD video; on small
    frames it ranks, and its absolute value should not be read.

    Args:
        pred, target: uint8 [F, H, W, 3] or float [F, 3, H, W] in [0, 1], H and W at least `MIN_SIDE`.
        threads: of libvmaf.

    Raises:
        ValueError: the clips do not fit, or this ffmpeg has no libvmaf.
        RuntimeError: ffmpeg failed; its last line is quoted.
    """
    first, second = frame_pair(pred, target)
    if first.ndim != 4 or min(first.shape[-2:]) < MIN_SIDE:
        raise ValueError(
            f"VMAF needs one clip of frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {tuple(first.shape)}"
        )
    program = ffmpeg_with_libvmaf()
    height, width = first.shape[-2:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, clip in (("pred.rgb", first), ("target.rgb", second)):
            (folder / file).write_bytes(byte_frames(clip).cpu().numpy().tobytes())
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25"]
        planes = "format=yuv444p"  # full colour resolution: small frames have none to give away
        graph = (
            f"[0:v]{planes}[pred];[1:v]{planes}[target];"
            f"[pred][target]libvmaf=log_fmt=json:log_path=vmaf.json:n_threads={threads}"
        )
        answer = subprocess.run(
            [
                program, "-hide_banner", "-loglevel", "error", *raw, "-i", "pred.rgb", *raw, "-i", "target.rgb",
                "-lavfi", graph, "-f", "null", "-",
            ],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if answer.returncode != 0:
            raise RuntimeError(
                f"ffmpeg could not compute VMAF: {(answer.stderr.strip() or 'no message').splitlines()[-1]}"
            )
        report = json.loads((folder / "vmaf.json").read_text())
    return torch.tensor([frame["metrics"]["vmaf"] for frame in report["frames"]])


@cache
def ffmpeg_with_libvmaf() -> str:
    """Path of an ffmpeg that has libvmaf: the one imageio-ffmpeg finds ($IMAGEIO_FFMPEG_EXE, or its own).

    Raises:
        ValueError: it lacks libvmaf.
    """
    import imageio_ffmpeg  # late: it brings a program of 30 MB, which not every machine has

    program = imageio_ffmpeg.get_ffmpeg_exe()
    filters = subprocess.run(
        [program, "-hide_banner", "-filters"], capture_output=True, text=True, check=True
    ).stdout
    if " libvmaf " not in filters:
        raise ValueError(
            "this ffmpeg has no libvmaf: install imageio-ffmpeg from its wheel and unset IMAGEIO_FFMPEG_EXE, "
            "or leave vmaf out of the metrics"
        )
    return str(program)
