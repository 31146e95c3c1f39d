"""How a video moves: from frame to frame, smoothly or not, and whether at all (OpenCV's DIS flow, no weights)."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.metrics.flow import flow_fields
from fastar.metrics.frames import byte_frames
from fastar.metrics.quality.base import VideoScore

FASTEST = 0.05
"""Share of the pixels whose flow counts: the fastest, so that a small thing that moves is enough."""
MOVING, MOVING_SIDE, MOVING_FPS = 6.0, 256, 8
"""Pixels that they have to move between two frames, of frames with this shorter side at this rate."""


class TemporalFlickering(VideoScore):
    """1 - mean absolute difference of consecutive frames (Huang et al. 2024; pixels in [0, 1]).

    VBench's formula. VBench asks it of static videos only, after a filter; here every video is scored, and what moves
    scores lower. On one seed all methods see the same actions or prompt, so that their differences are flicker.
    """

    span, least = 2, 2

    def observe(self, video: Tensor) -> Tensor:
        """Mean absolute differences: [F - 1]."""
        return (video[1:] - video[:-1]).abs().mean(dim=(1, 2, 3))

    def judge(self, seen: Tensor) -> Tensor:
        return 1 - seen.mean()


class MotionSmoothness(VideoScore):
    """1 - mean absolute difference of every second frame to what its neighbours let expect, pixels in [0, 1].

    VBench's measure (Huang et al. 2024), with another interpolation: VBench has AMT-S; here both neighbours are
    warped half-way along DIS flow and averaged. The error of that flow is part of the score, and a picture that is
    held is smooth while it is held: read it beside the dynamic degree.
    """

    span, step, least = 3, 2, 3

    def observe(self, video: Tensor) -> Tensor:
        """Mean absolute error of each frame between two others: [(F - 1) // 2]."""
        frames = byte_frames(video)
        pixels = frames.cpu().numpy()
        starts = range(0, len(frames) - 2, 2)
        pairs = [pair for start in starts for pair in ((start, start + 2), (start + 2, start))]
        flows = flow_fields(frames, pairs)
        errors = []
        for start in starts:
            there, back = next(flows), next(flows)
            expected = (_half_way(pixels[start], there) + _half_way(pixels[start + 2], back)) / 2
            errors.append(float(np.abs(expected - pixels[start + 1]).mean()) / 255)
        return torch.tensor(errors)

    def judge(self, seen: Tensor) -> Tensor:
        return 1 - seen.mean()


class DynamicDegree(VideoScore):
    """Share of the pairs of frames, about 8 a second, between which something moves.

    It does where the mean flow of the fastest 5 % of the pixels is above 6 pixels (for frames whose shorter side is
    256; others in proportion). VBench (Huang et al. 2024) has RAFT's flow, the same threshold and rate, and calls a
    video dynamic, yes or no, if a quarter of its pairs are; the share is finer, and DIS sees large motion less well.

    Args:
        fps: frames a second of the video.
    """

    def __init__(self, *, fps: float = 12.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fps <= 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.step = max(1, round(fps / MOVING_FPS))
        self.slowness = max(1.0, MOVING_FPS / fps)  # frames that are further apart have more time to move
        self.span = self.least = self.step + 1

    def observe(self, video: Tensor) -> Tensor:
        """Whether something moves between frames `step` apart: float [N]."""
        least = self.slowness * MOVING * min(video.shape[-2:]) / MOVING_SIDE
        pairs = pairwise(range(0, len(video), self.step))
        moved = [_fastest(flow) > least for flow in flow_fields(byte_frames(video), pairs)]
        return torch.tensor(moved, dtype=torch.float32)

    def judge(self, seen: Tensor) -> Tensor:
        return seen.mean()


def _half_way(frame: NDArray[np.uint8], flow: NDArray[np.float32]) -> NDArray[np.float32]:
    """A frame [H, W, 3] moved half-way along the flow that starts from it."""
    import cv2

    rows, columns = np.indices(frame.shape[:2], dtype=np.float32)
    x, y = columns - flow[..., 0] / 2, rows - flow[..., 1] / 2
    moved = cv2.remap(frame.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, dtype=np.float32)


def _fastest(flow: NDArray[np.float32]) -> float:
    """Mean length of the longest 5 % of the vectors of a flow [H, W, 2]."""
    speeds = np.sort(np.linalg.norm(flow, axis=-1).ravel())
    return float(speeds[-max(1, int(FASTEST * speeds.size)) :].mean())
