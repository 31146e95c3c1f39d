"""The loop that owns a backbone and a method's state and makes video, chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.attention.state import AttentionState
from fastar.backbones.conditions import ImageCondition
from fastar.backbones.prompts import Prompts
from fastar.backbones.wan.transformer import CausalWanTransformer
from fastar.rollout.flight import InFlight
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.noise import FirstNoise, chunk_noise
from fastar.rollout.passes import ConditionedPasses


class NonFiniteError(RuntimeError):
    """A pass produced NaN or infinity; the rollout stops before its cache is touched."""


class PassTimer(Protocol):
    """Times the parts of a rollout (`fastar.metrics.efficiency`)."""

    def measure(self, name: str) -> Any:
        """Context manager around one part: denoise, commit or decode."""


class Rollout:
    """One batch of videos in the making.

    Args:
        transformer: the backbone, in eval mode.
        state: the method's state (cache, selectors, engine) for this batch.
        loop: order of passes and noise levels.
        seeds: one per video of the batch.
        latent_shape: (channels, height, width) of a latent frame.
        prompts: what the videos shall show, one prompt each; None for a backbone that reads no text.
        timer: measures denoise and commit passes, or None.
        end_frame: where the video ends, so that loops with several chunks in flight begin none there; None: it goes on.
        negative: what guidance leads away from, one prompt or one per video; exactly where the loop has guidance. The
            state is then of twice as many sequences, those of `prompts` first. No part of `state_dict`.
        image: what the videos start from; None for a backbone that starts from noise alone. No part of `state_dict`.
        capture: run passes that repeat as CUDA graphs (`fastar.rollout.capture`). What `denoise` returns is then looked
            at for NaN in the commit alone.

    Raises:
        ValueError: prompts or an image are missing, not asked for, or not one of the right sizes for each video.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer,
        *,
        state: AttentionState,
        loop: ChunkLoop,
        seeds: Sequence[int],
        latent_shape: tuple[int, int, int],
        prompts: Prompts | None = None,
        negative: Prompts | None = None,
        timer: PassTimer | None = None,
        end_frame: int | None = None,
        image: ImageCondition | None = None,
        capture: bool = False,
    ) -> None:
        self.transformer, self.state, self.loop, self.timer = transformer, state, loop, timer
        self.seeds = [int(seed) for seed in seeds]
        self.latent_shape = tuple(latent_shape)
        self.next_frame, self.end_frame = 0, end_frame
        self._flight: list[InFlight] = []  # from `next_frame` on, as the last commit left them
        self._advanced: list[InFlight] | None = None  # after denoising since then
        self._remembered: dict[str, Any] = {}  # by selectors of chunks in flight, before it
        self.device = next(transformer.parameters()).device
        self._first_noise = FirstNoise(self.seeds, (loop.chunk_frames, *self.latent_shape), self.device)
        self.pose = (
            None if transformer.odometer is None else transformer.odometer.start(len(self.seeds), self.device)
        )
        self.passes = ConditionedPasses(
            transformer, state, videos=len(self.seeds), latent_shape=self.latent_shape, prompts=prompts,
            negative=negative, image=image, guidance=loop.guidance, capture=capture,
        )  # fmt: skip

    @property
    def prompts(self) -> Prompts | None:
        """What the videos show from the next pass on."""
        return self.passes.prompts

    def use_prompts(self, prompts: Prompts | None) -> None:
        """Show `prompts` from the next pass on; see the class for what is refused."""
        self.passes.use_prompts(prompts)
        self._remembered = {}  # it was about another prompt

    @torch.inference_mode()
    def change_prompts(
        self, prompts: Prompts, recent: Tensor | None = None, actions: Tensor | None = None
    ) -> None:
        """Show `prompts` from the next chunk on, with recent frames cached again as if they had been made under them.

        If a pass fails on the way, the rollout stands at the first frame that is not cached again.

        Args:
            prompts: one per video.
            recent: clean latents [B, n, C, h, w] of the last n frames, whole chunks; None: the cache stays as it is.
            actions: [B, n] int64 of those frames.

        Raises:
            ValueError: prompts that do not fit, other than whole chunks, more frames than there are, a cache that
                cannot drop them any more, or a backbone that follows its pose. Nothing has changed then.
        """
        self.passes.check_prompts(prompts)
        frames = 0 if recent is None else recent.shape[1]
        if recent is None or not frames:
            self.use_prompts(prompts)
            return
        starts, first = self.loop.chunk_starts(frames), self.next_frame - frames
        if first < 0:
            raise ValueError(f"{frames} frames cannot be rewritten: only {self.next_frame} have been made")
        if self.pose is not None:
            raise ValueError(
                "this backbone follows its pose from frame to frame: its frames cannot be rewritten"
            )
        self.state.rewrite(first)
        self.use_prompts(prompts)
        self.next_frame = first
        for start in starts:
            part = slice(start, start + self.loop.chunk_frames)
            self.commit(recent[:, part], None if actions is None else actions[:, part], kind=PassKind.REWRITE)

    @torch.inference_mode()
    def prefill(self, latents: Tensor, actions: Tensor | None = None) -> None:
        """Push true history [B, F, C, h, w] through the commit pass, chunk by chunk (F a multiple of the chunk)."""
        for start in self.loop.chunk_starts(latents.shape[1]):
            part = slice(start, start + self.loop.chunk_frames)
            self.commit(
                latents[:, part], None if actions is None else actions[:, part], kind=PassKind.PREFILL
            )

    @torch.inference_mode()
    def generate(self, num_frames: int, actions: Tensor | None = None) -> Iterator[Tensor]:
        """Yield clean latent chunks [B, n, C, h, w], each committed to the cache before it is yielded.

        Args:
            num_frames: a multiple of the chunk.
            actions: [B, num_frames] int64, or None for a backbone without actions; a loop with several chunks in flight
                needs those of all frames in flight, up to `end_frame`.

        Raises:
            ValueError: `num_frames` is no whole number of chunks, or there are too few actions.
            NonFiniteError: a pass produced NaN or infinity.
        """
        if actions is not None and actions.shape[1] < num_frames:
            raise ValueError(f"{num_frames} frames were asked for and only {actions.shape[1]} actions given")
        for start in self.loop.chunk_starts(num_frames):
            part = slice(start, start + self.loop.frames_in_flight)
            yield self.step(None if actions is None else actions[:, part])

    @torch.inference_mode()
    def step(self, actions: Tensor | None = None) -> Tensor:
        """Denoise and commit the next chunk; returns its clean latents [B, n, C, h, w]. `actions` as in `denoise`."""
        clean = self.denoise(actions)
        self.commit(clean, None if actions is None else actions[:, : self.loop.chunk_frames])
        return clean

    @torch.inference_mode()
    def denoise(
        self, actions: Tensor | None = None, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Denoise the next chunk, and those in flight with it, without committing it (as protocols A and B do).

        Called again before the commit it starts over.

        Args:
            actions: [B, n] int64 of this chunk; of all frames in flight, `loop.frames_in_flight` or up to `end_frame`.
            on_step: called with each step's prediction of the clean chunk.
        """
        if self._advanced is None:
            self._remembered = self.state.in_flight()
        else:
            self.state.restore_in_flight(self._remembered)
        self._advanced = flight = list(self._flight)
        with self._timed("denoise"):
            steps = [chunk.step for chunk in flight]
            for context in self.loop.denoise_passes(self.next_frame, steps, self.end_frame):
                flight += [self._begun(part.first_frame) for part in context.parts[len(flight) :]]
                latents = flight[0].latents
                if context.chunks:
                    latents = torch.cat([chunk.latents for chunk in flight], dim=1)
                velocity = self.run_pass(context, latents, self.loop.actions_of(context, actions))
                parts = velocity.split(self.loop.chunk_frames, dim=1)
                moved = [
                    chunk.after(part, self.loop, self.seeds)
                    for chunk, part in zip(flight, parts, strict=True)
                ]
                flight[:] = [chunk for chunk, _ in moved]
                if on_step is not None:
                    on_step(moved[0][1])
            # The GPU is still at work, before the host looks here or, if captured, in the commit.
            self._first_noise.draw_ahead(flight[-1].first_frame + self.loop.chunk_frames)
        for chunk in flight if self.passes.captured is None else ():
            self._require_finite(torch.isfinite(chunk.latents).all(), "denoising")
        return flight[0].latents

    @torch.inference_mode()
    def commit(
        self, clean: Tensor, actions: Tensor | None = None, *, kind: PassKind = PassKind.COMMIT
    ) -> None:
        """Cache the clean chunk [B, n, C, h, w] and move on to the next one."""
        if self.loop.commit_noise:
            draw = len(self.loop.timesteps)
            noise = chunk_noise(self.seeds, self.next_frame, draw, tuple(clean.shape[1:]), self.device)
            clean = torch.lerp(clean.to(noise), noise, self.loop.commit_timestep / 1000)
        with self._timed("commit"):
            self.run_pass(self.loop.commit_pass(self.next_frame, kind), clean, actions)
        self._move_to(self.next_frame + self.loop.chunk_frames)
        poses = self._poses(actions)
        if poses is not None:
            self.pose = poses[:, -1]

    def run_pass(self, context: PassContext, latents: Tensor, actions: Tensor | None) -> Tensor:
        """One forward under `context`; the state commits only if its result is finite."""
        return self.passes.run(
            context, latents, self._require_finite, actions=actions, poses=self._poses(actions)
        )

    def follow(self, other: "Rollout") -> None:
        """Stand where `other` stands, whose commits have filled this rollout's cache (protocol A)."""
        self.pose = other.pose
        self._move_to(other.next_frame)
        self.state.cache_changed(self.next_frame)
        self.state.follow_actions(other.state)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-for-bit continuation needs, as copies; a state may be loaded on another device."""
        return {
            "next_frame": self.next_frame,
            "seeds": self.seeds,
            "pose": None if self.pose is None else self.pose.cpu(),
            "prompts": None if self.prompts is None else self.prompts.state_dict(),
            "attention": self.state.state_dict(),
        } | ({"in_flight": [chunk.state_dict() for chunk in self._flight]} if self._flight else {})

    @torch.inference_mode()  # buffers that grew in a pass can be written in this mode alone
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the saved rollout had other seeds, prompts where this one has none, or more chunks in flight.
        """
        if list(saved["seeds"]) != self.seeds:
            raise ValueError(
                f"the saved rollout has seeds {saved['seeds']}, this one {self.seeds}: use the same seeds"
            )
        flying = saved.get("in_flight", [])
        if len(flying) > self.loop.most_in_flight - 1:
            raise ValueError(
                f"the saved rollout has {len(flying)} chunks in flight, more than this loop keeps between steps: "
                "continue it with the rollout=... that it was made with"
            )
        prompts = saved.get("prompts")  # states from before there were prompts have none
        self.use_prompts(None if prompts is None else Prompts.from_state(prompts))
        self.next_frame = int(saved["next_frame"])
        self._flight = [InFlight.from_state(chunk, self.device) for chunk in flying]
        self._advanced = None
        self.pose = None if saved["pose"] is None else saved["pose"].to(self.device)
        self.state.load_state_dict(saved["attention"])

    def _begun(self, first_frame: int) -> InFlight:
        return InFlight(first_frame, 0, self._first_noise.of(first_frame))

    def _move_to(self, next_frame: int) -> None:
        """Frames before `next_frame` are committed: they are in flight no more."""
        self.next_frame = next_frame
        flight = self._flight if self._advanced is None else self._advanced
        self._flight, self._advanced = [chunk for chunk in flight if chunk.first_frame >= next_frame], None

    def _require_finite(self, finite: Tensor, what: str) -> None:
        """Twice a chunk, not in every pass: each look makes the GPU wait for the host."""
        if not finite:
            raise NonFiniteError(
                f"the backbone returned NaN or infinity in the {what} of frames {self.next_frame} to "
                f"{self.next_frame + self.loop.chunk_frames - 1}: the cache is as it was before this chunk"
            )

    def _poses(self, actions: Tensor | None) -> Tensor | None:
        """Poses [B, n, 3] of the frames that follow the last committed one, for a backbone that wants them."""
        if self.transformer.odometer is None or self.pose is None or actions is None:
            return None
        return self.transformer.odometer.advance(self.pose, actions.to(self.device))

    def _timed(self, name: str) -> Any:
        return self.timer.measure(name) if self.timer is not None else nullcontext()
