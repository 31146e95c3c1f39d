"""What one pass of a backbone is, and the one call a backbone makes into the attention machinery.

A rollout runs the backbone in passes. A `PassContext` says which frames a pass covers, how noisy each is and
whether its keys are to be kept; an `Attend` is what the backbone calls for every attention of that pass.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    A pass over several chunks in flight, each at a step of its own, lists them in `chunks`, oldest first. Attention
    goes through them one by one, and what selects or measures sees one of these, never the whole. Each says in
    `in_flight` which frames [first, stop) the pass covers; its tokens read them beside the cache: all of them, or, if
    `causal`, its own and earlier ones.
    """

    kind: PassKind
    first_frame: int
    num_frames: int
    timesteps: tuple[float, ...]
    step: int = 0
    num_steps: int = 1
    chunks: tuple[PassContext, ...] = ()
    in_flight: tuple[int, int] | None = None
    causal: bool = False

    @property
    def parts(self) -> tuple[PassContext, ...]:
        """The chunks in flight, or the pass itself if it is of one chunk."""
        return self.chunks or (self,)

    def parts_in_tokens(self, tokens: int) -> Iterator[tuple[PassContext, slice, int]]:
        """The parts, with `tokens` a frame: which queries are theirs, and how many of the pass's keys they see."""
        for part in self.parts:
            start = (part.first_frame - self.first_frame) * tokens
            seen = (part.visible[1] - self.first_frame) * tokens
            yield part, slice(start, start + part.num_frames * tokens), seen

    @property
    def pass_frames(self) -> tuple[int, int]:
        """Frames [first, stop) that the whole pass covers."""
        return self.in_flight or (self.first_frame, self.first_frame + self.num_frames)

    @property
    def visible(self) -> tuple[int, int]:
        """Those of them that its tokens read."""
        first, stop = self.pass_frames
        return first, self.first_frame + self.num_frames if self.causal else stop

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
