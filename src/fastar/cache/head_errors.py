"""Which heads need the past: how much a layer's output suffers if one head sees only its newest frames.

Few heads look far back, most are local (DuoAttention, Xiao et al. 2024, on language models; measured here by
experiments/calibrate.py). A budget that knows this is spent where it matters (Ada-KV, Feng et al. 2024).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.cache.measured import load_measured, rounded

COMMAND = "calibrate.py"
"""Of experiments/, which measures them."""

Table = list[list[int]]
"""A number for every layer and head."""


@dataclass(frozen=True)
class HeadErrors:
    """Measured cost of forgetting.

    Attributes:
        frames: n ascending numbers of frames.
        errors: [layers][heads][n]: mean squared change of the layer's attention output (after its projection), over its
            mean square, if this head alone attends to the current chunk and its newest `frames` only.
        weights: sha256 of the weights it was measured on.
    """

    frames: tuple[int, ...]
    errors: tuple[tuple[tuple[float, ...], ...], ...]
    weights: str | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.frames, self.frames[1:], strict=False))
        if not self.frames or self.frames[0] < 1 or not rising:
            raise ValueError(f"frames must be ascending positive numbers, got {list(self.frames)}")
        flat = [error for layer in self.errors for curve in layer for error in curve]
        if not all(0 <= error < math.inf for error in flat):
            raise ValueError("errors must be finite and not negative")
        if any(len(curve) != len(self.frames) for layer in self.errors for curve in layer):
            raise ValueError(f"every head needs {len(self.frames)} errors, one for each number of frames")
        if len({len(layer) for layer in self.errors}) != 1:
            raise ValueError("every layer must have the same number of heads")

    @property
    def content(self) -> tuple[Any, ...]:
        """What decides a result."""
        return (self.frames, self.errors)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.errors), len(self.errors[0])

    def allot(self, mean_frames: float) -> Table:
        """Frames for every head, on average at most `mean_frames`, so that the sum of errors is small.

        Every head starts with the fewest; then, again and again, the extension that lowers the error most for its
        frames is bought, as long as one can be paid.
        """
        layers, heads = self.shape
        chosen = [[0] * heads for _ in range(layers)]
        left = (mean_frames - self.frames[0]) * layers * heads
        while True:
            offers = []
            for layer, curves in enumerate(self.errors):
                for head, curve in enumerate(curves):
                    now = chosen[layer][head]
                    for later in range(now + 1, len(curve)):
                        price = self.frames[later] - self.frames[now]
                        gain = curve[now] - curve[later]
                        if price <= left and gain > 0:
                            offers.append((gain / price, -layer, -head, -later, price))
            if not offers:
                return [[self.frames[index] for index in layer] for layer in chosen]
            _, layer, head, later, price = max(offers)
            chosen[-layer][-head] = -later
            left -= price

    def shares(self) -> list[tuple[float, int, int]]:
        """(share, layer, head) of the sum of errors that the fewest frames make, largest first."""
        total = sum(curve[0] for layer in self.errors for curve in layer)
        heads = [(layer, head) for layer in range(self.shape[0]) for head in range(self.shape[1])]
        shares = [(self.errors[layer][head][0] / total, layer, head) for layer, head in heads]
        return sorted(shares, key=lambda share: -share[0])

    def is_local(self, layer: int, head: int, frames: int, tolerance: float) -> bool:
        """Whether a window of `frames` (one of `self.frames`) leaves a head an error of at most `tolerance`.

        No head is if that is the longest window that was measured: what lies beyond is not known.
        """
        return frames < self.frames[-1] and self.errors[layer][head][self.frames.index(frames)] <= tolerance

    def save(self, path: str | Path, **made: object) -> None:
        """Write as JSON, with what else is to be known about the measurement."""
        rows = {"frames": list(self.frames), "weights": self.weights, **made, "errors": rounded(self.errors)}
        Path(path).write_text(json.dumps(rows) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadErrors:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """

        def build(saved: Mapping[str, Any]) -> HeadErrors:
            errors = tuple(tuple(tuple(curve) for curve in layer) for layer in saved["errors"])
            return cls(tuple(saved["frames"]), errors, saved["weights"])

        without = "head_errors=null to give all heads the same budget"
        return load_measured(path, build, command=COMMAND, without=without)
