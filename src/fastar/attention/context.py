"""What one pass of a backbone is, and the one call a backbone makes into the attention machinery.

A rollout runs the backbone in passes. A `PassContext` says which frames a pass covers, how noisy each is and
whether its keys are to be kept; an `Attend` is what the backbone calls for every attention of that pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from torch import Tensor

Stream = Literal["self", "text", "image", "mouse", "keyboard"]
"""Whose keys are attended to; mouse and keyboard are those of an action module (`fastar.attention.actions`)."""


class PassKind(StrEnum):
    """Why the backbone is being run."""

    PREFILL = "prefill"  # true history pushed through at t=0, kept
    DENOISE = "denoise"  # one denoising step of the current chunk, not kept
    COMMIT = "commit"  # the finished chunk at t=0, kept
    REWRITE = "rewrite"  # frames already kept are computed again (prompt switch) and replace what was kept


@dataclass(frozen=True)
class PassContext:
    """One pass: `num_frames` latent frames from absolute index `first_frame`.

    `timesteps` holds one noise level per frame, 0 (clean) to 1000 (noise). `step` of `num_steps` is the index
    of the denoising step; commit and prefill passes leave them at 0 of 1.
    """

    kind: PassKind
    first_frame: int
    num_frames: int
    timesteps: tuple[float, ...]
    step: int = 0
    num_steps: int = 1

    @property
    def commits(self) -> bool:
        """Whether the keys of this pass are kept when it ends."""
        return self.kind != PassKind.DENOISE

    @property
    def share_done(self) -> float:
        """Share of the denoising steps that are already done, in [0, 1)."""
        return self.step / self.num_steps


class Attend(Protocol):
    """Attention as a backbone sees it: raw projections in, attended values out.

    `q` is [B, H, Lq, D]; `k` and `v` are [B, H, Lk, D]: after q/k normalisation, before rotary embedding,
    which the implementer applies. Returns [B, H, Lq, D]. In the action streams keys are one a frame; of the mouse each
    place in the picture is a sequence of the batch.
    """

    def __call__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...
