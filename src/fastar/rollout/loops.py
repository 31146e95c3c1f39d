"""Loops: the order of passes in which an autoregressive video model is run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastar.attention.context import PassContext, PassKind


@dataclass(frozen=True, kw_only=True)
class ChunkLoop:
    """Self-Forcing's order: for each chunk a few denoising passes, then one commit pass on the clean chunk.

    All denoising passes of a chunk read the same cache; only the commit pass changes it.

    Attributes:
        chunk_frames: latent frames denoised together.
        timesteps: noise level of each denoising pass, 1000 first, falling (`fastar.rollout.schedules`).
        commit_timestep: noise level at which the finished chunk is cached (Self-Forcing's context noise).
        renoise: True draws fresh noise between steps (distilled few-step models, as Self-Forcing does); False takes
            Euler steps along the velocity (models trained by plain flow matching).
    """

    chunk_frames: int
    timesteps: Sequence[float]
    commit_timestep: float = 0.0
    renoise: bool = False

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if not self.timesteps or self.timesteps[0] != 1000 or not falling or self.timesteps[-1] <= 0:
            raise ValueError(f"timesteps must fall from 1000 and stay above 0, got {list(self.timesteps)}")
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {self.chunk_frames}")

    @property
    def passes_per_chunk(self) -> int:
        """Forward passes for one chunk, the commit counted."""
        return len(self.timesteps) + 1

    def denoise_passes(self, first_frame: int) -> Iterator[PassContext]:
        """The denoising passes of the chunk that starts at `first_frame`."""
        for step, timestep in enumerate(self.timesteps):
            yield PassContext(
                kind=PassKind.DENOISE,
                first_frame=first_frame,
                num_frames=self.chunk_frames,
                timesteps=(float(timestep),) * self.chunk_frames,
                step=step,
                num_steps=len(self.timesteps),
            )

    def commit_pass(self, first_frame: int, kind: PassKind = PassKind.COMMIT) -> PassContext:
        """The pass that caches the clean chunk at `first_frame`: COMMIT, or PREFILL for true history."""
        return PassContext(
            kind=kind,
            first_frame=first_frame,
            num_frames=self.chunk_frames,
            timesteps=(self.commit_timestep,) * self.chunk_frames,
        )
