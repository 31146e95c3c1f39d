"""Optical flow (OpenCV's DIS, Kroeger et al. 2016), and whether the picture turns the way the action says: its sign."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

LEFT, RIGHT = -1, 1


def flow_fields(frames: Tensor, pairs: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.float32]]:
    """Optical flow from one frame to another, of each of `pairs`: float32 [H, W, 2], pixels to the right and down.

    Args:
        frames: uint8 [F, H, W, 3].
        pairs: indices of the frame that the flow starts from, and of the one it leads to.

    Raises:
        ValueError: other frames, or OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError("optical flow needs OpenCV: pip install opencv-python-headless") from error
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise ValueError(
            f"optical flow needs at least 2 uint8 frames [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}"
        )
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.cpu().numpy()]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for one, other in pairs:
        yield dis.calc(grey[one], grey[other], None)  # type: ignore[call-overload]


def horizontal_flow(frames: Tensor) -> Tensor:
    """Mean horizontal flow between consecutive frames, in pixels, positive to the right: float32 [F - 1].

    Takes frames, and raises, as `flow_fields` does.
    """
    flows = flow_fields(frames, pairwise(range(len(frames))))
    return torch.tensor([float(flow[..., 0].mean()) for flow in flows])


class TurnAgreement(Metric):
    """Share of turns whose mean flow has the right sign: turning left moves the picture to the right."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    turns: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("turns", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, frames: Tensor, direction: Tensor) -> None:
        """Add turns: frames uint8 [B, F, H, W, 3] from before to after, direction int [B] of `LEFT` or `RIGHT`."""
        if direction.shape != frames.shape[:1] or not bool((direction.abs() == 1).all()):
            raise ValueError(
                f"direction must hold {LEFT} (left) or {RIGHT} (right) for each of the {len(frames)} clips"
            )
        flow = torch.stack([horizontal_flow(clip).mean() for clip in frames])
        agrees = torch.sign(flow) == -direction.to(flow)
        self.right += int(agrees.sum())
        self.turns += len(frames)

    def compute(self) -> Tensor:
        """Right turns / all turns, float32."""
        return self.right / self.turns
