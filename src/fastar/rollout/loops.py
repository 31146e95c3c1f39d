"""Loops: the order of passes in which an autoregressive video model is run.

A loop says which pass comes next, given how many steps each chunk in flight has made; `fastar.rollout.rollout` runs the
passes and moves the latents on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.cache.base import check_choice
from fastar.rollout.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class ChunkLoop:
    """Self-Forcing's order: for each chunk a few denoising passes, then one commit pass on the clean chunk.

    All denoising passes of a chunk read the same cache; only the commit pass changes it.

    Attributes:
        chunk_frames: latent frames denoised together.
        timesteps: noise level of each denoising pass, 1000 first, falling (`fastar.rollout.schedules`).
        commit_timestep: noise level at which the finished chunk is cached (Self-Forcing's context noise).
        renoise: True draws fresh noise between steps (distilled few-step models, as Self-Forcing does); False takes
            steps along the velocity (models trained by plain flow matching).
        solver: without fresh noise: `euler`, or `unipc`, which corrects each step by the ones before it (SkyReels-V2).
        commit_noise: True noises the finished chunk to `commit_timestep` before it is cached (SkyReels-V2's
            addnoise_condition); False tells the model this level and shows it the clean chunk.
        guidance: scale of classifier-free guidance: each pass is run with the prompt and with a negative one, which has
            a cache of its own, and the velocity is the second's plus so many times the difference. None: without.
        window: what the published model attends to, as arguments of `fastar.cache.StockWindow`; a method may use it.
    """

    chunk_frames: int
    timesteps: Sequence[float]
    commit_timestep: float = 0.0
    renoise: bool = False
    solver: str = "euler"
    commit_noise: bool = False
    guidance: float | None = None
    window: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if not self.timesteps or self.timesteps[0] != 1000 or not falling or self.timesteps[-1] <= 0:
            raise ValueError(f"timesteps must fall from 1000 and stay above 0, got {list(self.timesteps)}")
        check_choice("solver", self.solver, SOLVERS)
        if self.renoise and self.solver != "euler":
            raise ValueError(
                f"solver={self.solver} looks back on steps that fresh noise leaves behind: set renoise to false"
            )
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {self.chunk_frames}")
        if self.guidance is not None and self.guidance < 0:
            raise ValueError(f"guidance must not be negative, got {self.guidance}: null leaves it out")
        if self.commit_noise and not 0 < self.commit_timestep < 1000:
            raise ValueError(
                f"commit_noise needs a commit_timestep within 0..1000, got {self.commit_timestep}"
            )

    @property
    def passes_per_chunk(self) -> int:
        """Forward passes for one chunk once the rollout is under way, the commit counted."""
        return len(self.timesteps) + 1

    @property
    def most_in_flight(self) -> int:
        """Chunks that are denoised at the same time, at most."""
        return 1

    @property
    def frames_in_flight(self) -> int:
        """Frames that a denoising pass covers, at most: so many actions it needs."""
        return self.most_in_flight * self.chunk_frames

    def chunk_starts(self, num_frames: int) -> range:
        """Where the chunks of so many frames start, counted from the first one.

        Raises:
            ValueError: they are not a whole number of chunks.
        """
        if num_frames < 1 or num_frames % self.chunk_frames:
            raise ValueError(
                f"{num_frames} frames are not a whole number of {self.chunk_frames}-frame chunks: "
                f"ask for {max(1, round(num_frames / self.chunk_frames)) * self.chunk_frames}"
            )
        return range(0, num_frames, self.chunk_frames)

    def denoise_passes(
        self, first_frame: int, steps: Sequence[int] = (), end_frame: int | None = None
    ) -> Iterator[PassContext]:
        """The denoising passes until the chunk at `first_frame` is clean; in each, every chunk in flight makes a step.

        Args:
            first_frame: of the oldest chunk in flight, or of the next one if there is none.
            steps: that the chunks in flight have made, oldest first.
            end_frame: where the video ends, so that no chunk is begun there; None: it goes on.
        """
        for step in range(steps[0] if steps else 0, len(self.timesteps)):
            yield self._denoise_pass(first_frame, step)

    def _denoise_pass(self, first_frame: int, step: int) -> PassContext:
        return PassContext(
            kind=PassKind.DENOISE,
            first_frame=first_frame,
            num_frames=self.chunk_frames,
            timesteps=(float(self.timesteps[step]),) * self.chunk_frames,
            step=step,
            num_steps=len(self.timesteps),
        )

    def actions_of(self, context: PassContext, actions: Tensor | None) -> Tensor | None:
        """Of actions [B, n], those of a denoising pass.

        Raises:
            ValueError: there are fewer than the frames in flight.
        """
        if actions is None or self.most_in_flight == 1:
            return actions
        if actions.shape[1] < context.num_frames:
            raise ValueError(
                f"{context.num_frames} frames are in flight and only {actions.shape[1]} actions given: give those of "
                f"{self.frames_in_flight} frames, or say by end_frame where the video ends"
            )
        return actions[:, : context.num_frames]

    def commit_pass(self, first_frame: int, kind: PassKind = PassKind.COMMIT) -> PassContext:
        """The pass that caches the clean chunk at `first_frame`: COMMIT, or PREFILL for true history."""
        return PassContext(
            kind=kind,
            first_frame=first_frame,
            num_frames=self.chunk_frames,
            timesteps=(self.commit_timestep,) * self.chunk_frames,
        )


@dataclass(frozen=True, kw_only=True)
class StaggeredLoop(ChunkLoop):
    """Chunks in flight, each `stagger` steps behind the one before it, all denoised in the same passes.

    Rolling-Forcing (arXiv 2509.25161) has a chunk at each of its five levels: `stagger` 1. SkyReels-V2's diffusion
    forcing (arXiv 2504.13074) calls it ar_step. A chunk that is clean is committed by a pass of its own and leaves; the
    first chunk takes all its steps before anything is finished, and the last ones go on alone. With as many steps as
    there are levels it is `ChunkLoop`.

    Attributes:
        stagger: steps that a chunk makes before the next one is begun.
        causal: chunks in flight see their own frames and earlier ones (SkyReels-V2), or each other (Rolling-Forcing).
    """

    stagger: int
    causal: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stagger < 1:
            raise ValueError(
                f"stagger must be at least 1, got {self.stagger}: chunks that are all at one level are one chunk"
            )

    @property
    def passes_per_chunk(self) -> int:
        return min(self.stagger, len(self.timesteps)) + 1

    @property
    def most_in_flight(self) -> int:
        return -(-len(self.timesteps) // self.stagger)

    def denoise_passes(
        self, first_frame: int, steps: Sequence[int] = (), end_frame: int | None = None
    ) -> Iterator[PassContext]:
        now = list(steps)
        while not now or now[0] < len(self.timesteps):
            following = first_frame + len(now) * self.chunk_frames
            room = end_frame is None or following + self.chunk_frames <= end_frame
            if not now or (room and now[-1] >= self.stagger):
                now.append(0)
            yield self._window_pass(first_frame, now)
            now = [step + 1 for step in now]

    def _window_pass(self, first_frame: int, steps: Sequence[int]) -> PassContext:
        """One pass over all chunks in flight."""
        starts = [first_frame + number * self.chunk_frames for number in range(len(steps))]
        alone = [self._denoise_pass(start, step) for start, step in zip(starts, steps, strict=True)]
        if len(alone) == 1:
            return alone[0]
        together = (first_frame, starts[-1] + self.chunk_frames)
        chunks = tuple(replace(chunk, in_flight=together, causal=self.causal) for chunk in alone)
        return replace(
            alone[0],
            num_frames=together[1] - first_frame,
            timesteps=tuple(timestep for chunk in chunks for timestep in chunk.timesteps),
            chunks=chunks,
        )
