"""Chunks in flight: begun, and not clean yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastar.rollout.loops import ChunkLoop
from fastar.rollout.noise import chunk_noise
from fastar.rollout.solvers import unipc_step


@dataclass(frozen=True)
class InFlight:
    """A chunk between noise and clean.

    Attributes:
        first_frame: absolute index.
        step: steps it has made.
        latents: float32 [B, n, C, h, w] at the level of the next step; clean if all steps are made.
        past: what a solver looks back on, tensors of the same shape; nothing for Euler's.
    """

    first_frame: int
    step: int
    latents: Tensor
    past: tuple[Tensor, ...] = ()

    def after(self, velocity: Tensor, loop: ChunkLoop, seeds: Sequence[int]) -> tuple[InFlight, Tensor]:
        """The chunk one step later, and the clean chunk that `velocity` [B, n, C, h, w] points to."""
        sigma = loop.timesteps[self.step] / 1000
        following = loop.timesteps[self.step + 1] / 1000 if self.step + 1 < len(loop.timesteps) else 0.0
        clean = self.latents - sigma * velocity
        past: tuple[Tensor, ...] = ()
        if following == 0:
            latents = clean
        elif loop.solver == "unipc":
            latents, past = unipc_step(loop.timesteps, self.step, self.latents, velocity, self.past)
        elif loop.renoise:
            shape, device = tuple(self.latents.shape[1:]), self.latents.device
            noise = chunk_noise(seeds, self.first_frame, self.step + 1, shape, device)
            latents = torch.lerp(clean, noise, following)
        else:
            latents = self.latents + (following - sigma) * velocity
        return InFlight(self.first_frame, self.step + 1, latents, past), clean

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors on the CPU."""
        plain = {"first_frame": self.first_frame, "step": self.step, "latents": self.latents.cpu()}
        return plain | ({"past": [tensor.cpu() for tensor in self.past]} if self.past else {})

    @classmethod
    def from_state(cls, saved: dict[str, Any], device: torch.device) -> InFlight:
        """The chunk of a `state_dict`, on `device`."""
        past = tuple(tensor.to(device) for tensor in saved.get("past", ()))
        return cls(saved["first_frame"], saved["step"], saved["latents"].to(device), past)
