"""Where the tokens of a pass stand, and how RoPE turns them: once a pass, for all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar.attention.rope import RotaryEmbedding, grid_positions


@dataclass(frozen=True)
class Places:
    """Of the tokens of `num_frames` frames from `first_frame` on: positions int64 [L, 3], RoPE's tables [L, D/2]."""

    first_frame: int
    positions: Tensor
    turns: tuple[Tensor, Tensor]


class PlaceMemory:
    """Makes `Places`.

    Attributes:
        keeps_addresses: whether places of as many frames are written over the last ones, for passes that were captured
            and read them there; nobody may hold on to them then.
    """

    def __init__(self, rope: RotaryEmbedding, grid: tuple[int, int], device: torch.device) -> None:
        self.rope, self.grid, self.device = rope, grid, device
        self.keeps_addresses = False
        self._last: dict[int, Places] = {}  # by number of frames

    def of(self, first_frame: int, num_frames: int) -> Places:
        """The places of `num_frames` frames."""
        last = self._last.get(num_frames)
        if last is not None and last.first_frame == first_frame:
            return last
        positions = grid_positions(first_frame, num_frames, self.grid, device=self.device)
        places = Places(first_frame, positions, self.rope.tables(positions))
        if last is not None and self.keeps_addresses:
            for old, new in zip(
                (last.positions, *last.turns), (places.positions, *places.turns), strict=True
            ):
                old.copy_(new)
            self.rope.forget()  # it knows positions by their address
            places = replace(last, first_frame=first_frame)
        self._last[num_frames] = places
        return places
