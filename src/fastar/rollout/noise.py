"""Noise that depends on the seed and the place in the video alone: not on batch size, device or interruption.

Draws of a chunk, in any loop: 0 is what it starts from; draw s, of a loop that draws fresh noise between steps, takes
it to the level of step s; one more, after those of all steps, is that of `commit_noise`. Chunks in flight together draw
each for itself, so that the order of passes plays no part.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def chunk_noise(
    seeds: Sequence[int], first_frame: int, draw: int, shape: tuple[int, ...], device: torch.device | str
) -> Tensor:
    """Standard normal noise [len(seeds), *shape], float32, drawn on the CPU.

    Args:
        seeds: one per video of the batch; equal seeds give equal noise whatever else is in the batch.
        first_frame: first frame of the chunk.
        draw: 0 for the initial noise, 1.. for the re-noising steps; see above.
        shape: (frames, channels, height, width).
        device: where the result goes.
    """
    noise = torch.stack([torch.randn(shape, generator=_generator(seed, first_frame, draw)) for seed in seeds])
    if torch.device(device).type != "cuda":
        return noise.to(device)
    return noise.pin_memory().to(device, non_blocking=True)  # else the host would wait for the passes before


class FirstNoise:
    """What chunks start from, which can be drawn before it is asked for, while a GPU is at work.

    A chunk of Wan2.1-1.3B is 300,000 numbers, drawn on the CPU, for which the GPU would else wait.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> None:
        self._seeds, self._shape, self._device = list(seeds), shape, torch.device(device)
        self._ahead: dict[int, Tensor] = {}

    def draw_ahead(self, first_frame: int) -> None:
        """Draw that of the chunk from `first_frame` on, in place of any other that is kept; on a GPU alone."""
        if self._device.type == "cuda" and first_frame not in self._ahead:
            self._ahead = {first_frame: self._draw(first_frame)}

    def of(self, first_frame: int) -> Tensor:
        """`chunk_noise` of draw 0, given away: who asks again gets it drawn again."""
        kept = self._ahead.pop(first_frame, None)
        return self._draw(first_frame) if kept is None else kept

    def _draw(self, first_frame: int) -> Tensor:
        return chunk_noise(self._seeds, first_frame, 0, self._shape, self._device)


def _generator(*key: int) -> torch.Generator:
    plain = tuple(int(number) for number in key)  # numpy integers print otherwise
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
