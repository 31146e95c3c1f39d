"""What the measures of a video by itself share: pixels are looked at once, for the whole video and for its windows."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fastar.metrics.frames import unit_frames

PIECE = 64  # observations made at once: bounds the memory
MOVES, STANDS = "dynamic_degree_lite", ("consistency_lite", "flickering_lite", "smoothness_lite")


@dataclass(frozen=True)
class Scores:
    """Of one video: `whole`, and `windows`, by the first frame of each; empty where not even two fit."""

    whole: float
    windows: Mapping[int, float]

    def drift(self) -> dict[int, float]:
        """Every later window minus the first."""
        first, *_ = self.windows.values() or [0.0]
        return {frame: score - first for frame, score in self.windows.items() if frame > 0}


class VideoScore(Metric):
    """Mean over videos of a score of whole videos. A measure says what it sees in frames, and how that is judged.

    Args:
        window: frames of the windows that `score` judges one by one; what is left at the end belongs to none. None: no
            windows.

    Attributes:
        span, step: the observation number i is of the `span` frames from number `step` * i on.
        least: frames that a video must have.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    span, step, least = 1, 1, 1
    total: Tensor
    count: Tensor

    def __init__(self, *, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if window is not None and window < 1:
            raise ValueError(f"a window must have at least 1 frame, got {window}")
        self.window = window
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def observe(self, video: Tensor) -> Tensor:
        """What is seen in a video, or a piece of one, [F, 3, H, W] in [0, 1]: [(F - span) // step + 1, ...]."""

    @abstractmethod
    def judge(self, seen: Tensor) -> Tensor:
        """The score of the frames that `seen` [N, ...] is of."""

    def score(self, video: Tensor) -> Scores:
        """Scores of one video, uint8 [F, H, W, 3] or float [F, 3, H, W] in [0, 1].

        Raises:
            ValueError: other pixels, or too few of them: at least `least` frames, in the video and in a window.
        """
        if video.ndim != 4:
            raise ValueError(f"a score is of one video [F, ...], got {tuple(video.shape)}")
        self._check_length(len(video), self.least, "a video")
        count = (len(video) - self.span) // self.step + 1
        pieces = [range(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]
        seen = torch.cat([self.observe(unit_frames(video[self._frames(piece)])) for piece in pieces])
        windows: dict[int, float] = {}
        if self.window is not None and len(video) >= 2 * self.window:
            # wherever it starts, it holds an observation
            self._check_length(self.window, self.least + self.step - 1, "a window")
            for first in range(0, len(video) - self.window + 1, self.window):
                last = first + self.window - self.span  # what starts later looks beyond the window
                windows[first] = float(self.judge(seen[-(-first // self.step) : last // self.step + 1]))
        return Scores(float(self.judge(seen)), windows)

    def update(self, video: Tensor) -> None:
        """Add videos, uint8 [B, F, H, W, 3] or float [B, F, 3, H, W] in [0, 1]."""
        if video.ndim != 5:
            raise ValueError(f"videos must be [B, F, ...], got {tuple(video.shape)}")
        for one in video:
            self.total += self.score(one).whole
            self.count += 1

    def compute(self) -> Tensor:
        """Mean over videos, float32; NaN before any update."""
        return (self.total / self.count).float()

    def _frames(self, seen: range) -> slice:
        """The frames that observations in a row are of."""
        return slice(self.step * seen.start, self.step * (seen.stop - 1) + self.span)

    def _check_length(self, frames: int, least: int, what: str) -> None:
        if frames < least:
            raise ValueError(f"{type(self).__name__} needs {what} of at least {least} frames, got {frames}")


def check_measures(names: Iterable[str]) -> None:
    """Raise a ValueError if measures that a frozen video passes best are asked for without the one that it fails."""
    asked = set(names)
    blind = sorted(name for name in asked if name.endswith(STANDS))
    if blind and MOVES not in asked:
        raise ValueError(
            f"{blind[0]} is perfect for a video that stands still: add {MOVES} to the metrics, to be read beside it"
        )


def quality_rows(
    measures: Mapping[str, VideoScore], videos: Iterable[Tensor]
) -> Iterator[tuple[int | None, dict[str, list[float]]]]:
    """What `measures` say of videos of one length, ready to be logged: metrics with one value a video.

    First of whole videos, with None: `<name>`, and `<name>/drift/end`, the last window minus the first, where there are
    windows. Then of each window, with its first frame: `<name>/window`, and, but for the first, `<name>/drift`, that
    minus the first window's.
    """
    shown = list(videos)
    for name, measure in measures.items():
        found = [measure.score(video) for video in shown]
        later = list(found[0].drift())
        whole = {name: [scores.whole for scores in found]}
        if later:
            whole[f"{name}/drift/end"] = [scores.drift()[later[-1]] for scores in found]
        yield None, whole
        for start in found[0].windows:
            rows = {f"{name}/window": [scores.windows[start] for scores in found]}
            if start in later:
                rows[f"{name}/drift"] = [scores.drift()[start] for scores in found]
            yield start, rows
