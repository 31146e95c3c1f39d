"""Protocols A and B: methods denoise the chunks of a dense trajectory, which is what gets committed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastar.compare.clips import Clips
from fastar.compare.free import Advance
from fastar.compare.scores import Scorer
from fastar.compare.session import Session
from fastar.metrics.attention import AttentionProbe
from fastar.rollout.method import Method
from fastar.rollout.protocols import TeeCache, lockstep_a, lockstep_b


def run_a(
    session: Session,
    methods: Mapping[str, Method],
    clips: Clips,
    seeds: Sequence[int],
    trajectory: Tensor,
    scorers: Mapping[str, Scorer],
    advance: Advance,
    *,
    attention_chunks: int = 0,
) -> None:
    """All `methods` at once, each reading its own cache of the keys that dense attention committed.

    Args:
        trajectory: latents [B, F, C, h, w]: true beginning, then the dense rollout.
        scorers: by method.
        attention_chunks: in how many chunks, the last among them, attention itself is held against dense.
    """
    dense = Method(name="dense")
    caches = {name: method.cache() for name, method in methods.items()}
    teacher = session.start(dense, seeds, cache=TeeCache(dense.cache(), list(caches.values())))
    students = {
        name: session.start(method, seeds, cache=caches[name], recorders=[scorers[name].density])
        for name, method in methods.items()
    }
    for name, student in students.items():
        scorers[name].started(student)
    probe, look_at = None, evenly(clips.prefill, trajectory.shape[1], session.chunk, attention_chunks)
    if look_at:
        probe = AttentionProbe({name: student.state for name, student in students.items()})
        teacher.state.recorders.append(probe)
    shown: dict[str, list[Tensor]] = {name: [] for name in methods}
    lockstep = lockstep_a(
        teacher, students, trajectory, clips.actions, clips.prefill, look_at=look_at, probe=probe
    )
    for first, name, chunk in lockstep:
        if probe is not None and first in look_at:
            scorers[name].attention(first, probe.scores(name))
        shown[name].append(session.decode(chunk))
        scorers[name].cost(first, students[name])
        scorers[name].chunk(first, chunk, shown[name][-1])
        advance()
    for name, chunks in shown.items():
        scorers[name].clip(torch.cat(chunks, 1))


def evenly(start: int, stop: int, chunk: int, count: int) -> list[int]:
    """First frames of `count` chunks between frames `start` and `stop`, evenly spread, the last chunk among them."""
    firsts = range(start, stop, chunk)
    count = min(count, len(firsts))
    return [firsts[(number + 1) * len(firsts) // count - 1] for number in range(count)]


def run_b(
    session: Session,
    method: Method,
    clips: Clips,
    seeds: Sequence[int],
    trajectory: Tensor,
    scorer: Scorer,
    advance: Advance,
) -> None:
    """One method, whose commit passes read its own cache; arguments as in `run_a`."""
    rollout = session.start(method, seeds, recorders=[scorer.density])
    scorer.started(rollout)
    shown: list[Tensor] = []
    for first, chunk in lockstep_b(rollout, trajectory, clips.actions, clips.prefill):
        shown.append(session.decode(chunk))
        scorer.cost(first, rollout)
        scorer.chunk(first, chunk, shown[-1])
        advance()
    scorer.clip(torch.cat(shown, 1))
