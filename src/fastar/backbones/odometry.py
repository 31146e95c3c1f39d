"""Dead reckoning: where a camera is if every action moves it as it should, and the rays that it then sees along.

A world model that is told only the last action has to count turns to know that it looks the way it looked a hundred
frames ago. The odometer counts for it. It knows nothing of the world: a step into a wall is counted as a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HARMONICS = (1, 2, 4)
WAVELENGTHS = (6.0, 12.0, 24.0, 48.0, 96.0)
FIELD_OF_VIEW = 90.0


class Odometer:
    """Integrates actions into poses, and turns poses into smooth features of the rays that start there.

    A ray is where the camera stands and the direction in which a column of tokens looks (the camera stays level, so
    rows differ by their place in the picture alone). Two tokens of a row with equal features show the same thing.

    Args:
        motions: for each action (steps forward, degrees to the left); the turn comes before the step.
        harmonics: of the direction, in features. The highest tells the finest difference.
        wavelengths: of the position, in features, in steps.
        field_of_view: horizontal, degrees, of a pinhole camera.
    """

    def __init__(
        self,
        motions: Sequence[tuple[float, float]],
        harmonics: Sequence[int] = HARMONICS,
        wavelengths: Sequence[float] = WAVELENGTHS,
        field_of_view: float = FIELD_OF_VIEW,
    ) -> None:
        if not 0 < field_of_view < 180:
            raise ValueError(f"field_of_view must lie between 0 and 180 degrees, got {field_of_view}")
        self.half_width = math.tan(math.radians(field_of_view) / 2)  # of the picture, at distance 1
        self.harmonics, self.wavelengths = tuple(harmonics), tuple(wavelengths)
        self.num_features = 2 * len(self.harmonics) + 4 * len(self.wavelengths)
        self.motions = [(float(step), math.radians(turn)) for step, turn in motions]
        # made where they are first used: a backbone may be built on the meta device and filled later
        self._tables: dict[torch.device, Tensor] = {}

    def start(self, batch: int, device: torch.device | str) -> Tensor:
        """Poses at the origin, heading 0: float64 [batch, 3] of x, y in steps and heading in radians."""
        return torch.zeros(batch, 3, dtype=torch.float64, device=device)

    def random_start(self, batch: int, device: torch.device | str) -> Tensor:
        """Poses anywhere, in any direction: in training, so that only differences of poses mean anything."""
        spread = torch.tensor(
            [max(self.wavelengths), max(self.wavelengths), 2 * math.pi], dtype=torch.float64, device=device
        )
        return torch.rand(batch, 3, dtype=torch.float64, device=device) * spread

    def advance(self, pose: Tensor, actions: Tensor) -> Tensor:
        """Poses [B, F, 3] of the frames that `actions` [B, F] lead to, from `pose` [B, 3] of the frame before."""
        step, turn = self._table_on(actions.device)[actions].unbind(-1)
        heading = pose[:, None, 2] + turn.cumsum(dim=1)
        x = pose[:, None, 0] + (step * heading.cos()).cumsum(dim=1)
        y = pose[:, None, 1] + (step * heading.sin()).cumsum(dim=1)
        return torch.stack([x, y, heading], dim=-1)

    def _table_on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.motions, dtype=torch.float64, device=device)
        return self._tables[device]

    def features(self, poses: Tensor, columns: int) -> Tensor:
        """Sines and cosines of the rays of poses [..., 3] through `columns` of tokens, left to right.

        Returns:
            float32 [..., columns, num_features].
        """
        middles = (torch.arange(columns, dtype=poses.dtype, device=poses.device) + 0.5) / columns
        to_the_left = torch.atan((1 - 2 * middles) * self.half_width)
        x, y, direction = torch.broadcast_tensors(
            poses[..., None, 0], poses[..., None, 1], poses[..., None, 2] + to_the_left
        )
        angles = [direction * harmonic for harmonic in self.harmonics]
        angles += [place * (2 * math.pi / length) for place in (x, y) for length in self.wavelengths]
        stacked = torch.stack(angles, dim=-1)
        return torch.cat([stacked.cos(), stacked.sin()], dim=-1).float()
