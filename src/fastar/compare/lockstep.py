"""Protocols A and B: methods denoise the chunks of a dense trajectory, which is what gets committed.

Interrupted, a run goes on after the chunks that it has denoised: commits are repeated, denoising is not.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastar import interruption
from fastar.compare.clips import AnyClips
from fastar.compare.free import Advance
from fastar.compare.scores import Scorer
from fastar.compare.screen import Screen, joined
from fastar.compare.session import Session
from fastar.metrics.attention import AttentionProbe
from fastar.results.run import Run
from fastar.rollout.method import Method
from fastar.rollout.protocols import TeeCache, lockstep_a, lockstep_b


def run_a(
    session: Session,
    methods: Mapping[str, Method],
    clips: AnyClips,
    seeds: Sequence[int],
    trajectory: Tensor,
    scorers: Mapping[str, Scorer],
    advance: Advance,
    *,
    save_every: int,
    attention_chunks: int = 0,
) -> None:
    """All `methods` at once, each reading its own cache of the keys that dense attention committed.

    Args:
        trajectory: latents [B, F, C, h, w]: true beginning, then the dense rollout.
        scorers: by method.
        save_every: chunks after which a run is saved; it is, too, when the process is asked to stop.
        attention_chunks: in how many chunks, the last among them, attention itself is held against dense.
    """
    dense = Method(name="dense")
    caches = {name: method.cache() for name, method in methods.items()}
    given = session.told(clips)
    teacher = session.start(dense, seeds, cache=TeeCache(dense.cache(), list(caches.values())), **given)
    students = {
        name: session.start(method, seeds, cache=caches[name], recorders=scorers[name].recorders, **given)
        for name, method in methods.items()
    }
    for name, student in students.items():
        scorers[name].started(student)
    probe, look_at = None, evenly(clips.prefill, trajectory.shape[1], session.chunk, attention_chunks)
    if look_at:
        probe = AttentionProbe({name: student.state for name, student in students.items()})
        teacher.state.recorders.append(probe)
    denoised = {name: Denoised(scorers[name].run, session, clips, trajectory, save_every) for name in methods}
    screen: Screen = session.screen(clips)
    done = min(len(chunks) for chunks in denoised.values())
    for chunks in denoised.values():
        chunks.keep(done, advance)
    lockstep = lockstep_a(
        teacher, students, trajectory, clips.actions, clips.prefill, done=done, look_at=look_at, probe=probe
    )
    for first, name, chunk in lockstep:
        if probe is not None and first in look_at:
            scorers[name].attention(first, probe.scores(name))
        screen.follow(trajectory, first)
        pixels = screen.preview(chunk)
        scorers[name].cost(first, students[name])
        scorers[name].selection(first)
        scorers[name].chunk(first, chunk, pixels)
        denoised[name].add(chunk, pixels)
        advance()
        if name == list(methods)[-1] and interruption.requested():
            for chunks in denoised.values():
                chunks.save()
            interruption.check()
    for name, chunks in denoised.items():
        scorers[name].clip(chunks.shown)


class Denoised:
    """The chunks that a run has denoised, this process's and earlier ones', saved from time to time."""

    def __init__(
        self, run: Run, session: Session, clips: AnyClips, trajectory: Tensor, save_every: int
    ) -> None:
        self.run, self.save_every = run, save_every
        self._latents: list[Tensor] = []
        if run.has_state:
            self._latents = list(run.load_state()["latents"].split(session.chunk, dim=1))
        screen = session.screen(clips)
        self._shown: list[Tensor | None] = []
        for number, chunk in enumerate(self._latents):
            screen.follow(trajectory, clips.prefill + number * session.chunk)
            self._shown.append(screen.preview(chunk))

    def __len__(self) -> int:
        return len(self._latents)

    def keep(self, count: int, advance: Advance) -> None:
        """Forget all but the first `count` chunks; call `advance` for each of these."""
        del self._latents[count:], self._shown[count:]
        for _ in range(count):
            advance()

    def add(self, chunk: Tensor, pixels: Tensor | None) -> None:
        """Latents [B, n, C, h, w] of the next chunk and, if it has any, its pixels [B, n, H, W, 3]."""
        self._latents.append(chunk.cpu())
        self._shown.append(pixels)
        if len(self) % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Have a later process go on after the chunks so far."""
        self.run.save_state({"latents": torch.cat(self._latents, 1)})

    @property
    def shown(self) -> Tensor | None:
        """uint8 [B, F, H, W, 3] of all chunks; None without pixels."""
        return joined(self._shown)


def evenly(start: int, stop: int, chunk: int, count: int) -> list[int]:
    """First frames of `count` chunks between frames `start` and `stop`, evenly spread, the last chunk among them."""
    firsts = range(start, stop, chunk)
    count = min(count, len(firsts))
    return [firsts[(number + 1) * len(firsts) // count - 1] for number in range(count)]


def run_b(
    session: Session,
    method: Method,
    clips: AnyClips,
    seeds: Sequence[int],
    trajectory: Tensor,
    scorer: Scorer,
    advance: Advance,
    *,
    save_every: int,
    capture: bool = False,
) -> None:
    """One method, whose commit passes read its own cache; arguments as in `run_a`, `capture` as in `free_run`."""
    rollout = session.start(
        method, seeds, recorders=scorer.counters(capture), capture=capture, **session.told(clips)
    )
    scorer.started(rollout)
    denoised = Denoised(scorer.run, session, clips, trajectory, save_every)
    screen: Screen = session.screen(clips)
    done = len(denoised)
    denoised.keep(done, advance)
    for first, chunk in lockstep_b(rollout, trajectory, clips.actions, clips.prefill, done=done):
        screen.follow(trajectory, first)
        pixels = screen.preview(chunk)
        scorer.cost(first, rollout)
        scorer.chunk(first, chunk, pixels)
        denoised.add(chunk, pixels)
        advance()
        if interruption.requested():
            denoised.save()
            interruption.check()
    scorer.clip(denoised.shown)
