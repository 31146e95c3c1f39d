"""Three ways to hold a method against dense attention on the same videos.

A trajectory is latents [B, T, C, h, w]: true history, of which there may be none, then frames that dense attention
generated. In lockstep (A and B) the method denoises every chunk of the trajectory's later part, but what is committed
is the trajectory, so errors do not add up and two methods are compared on the same past:

- **A**: keys and values of the past come from dense commit passes; the method only attends while denoising. What is
  left is the error of its attention.
- **B**: the method's own cache is also what its commit passes read, so an error in the cache changes later keys.
- **C**: free-running; the method commits what it generated.

Of a loop with several chunks in flight, these are the method's own in both, from noise on: the trajectory is committed
in place of the one that has become clean, and the others go on. Dense attention reproduces its trajectory then, too. A
method's errors add up over the passes of a chunk, as in any loop, and through the frames in flight with it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar.attention.tags import CommittedTags
from fastar.cache.base import CachePolicy, CacheSpec, CacheView, Execute, Staged, at_once
from fastar.rollout.rollout import Rollout


class Probe(Protocol):
    """Looks at attention calls while it is active (`fastar.metrics.attention`)."""

    active: bool


class TeeCache(CachePolicy):
    """Reads from `leader` and writes to it and to all `followers`: protocol A's way of giving every method dense keys.

    Args:
        leader: the policy that is read (dense).
        followers: policies that are filled with the same keys and values.
    """

    def __init__(self, leader: CachePolicy, followers: Sequence[CachePolicy]) -> None:
        super().__init__()
        self.leader, self.followers = leader, list(followers)

    @property
    def everyone(self) -> list[CachePolicy]:
        return [self.leader, *self.followers]

    def bind(self, spec: CacheSpec) -> None:
        super().bind(spec)
        for policy in self.everyone:
            policy.bind(spec)

    def view(self, layer: int) -> CacheView:
        return self.leader.view(layer)

    def stage(self, layer: int, staged: Staged) -> None:
        for policy in self.everyone:
            policy.stage(layer, staged)

    def commit(self, first_frame: int, num_frames: int, execute: Execute = at_once) -> None:
        for policy in self.everyone:
            policy.commit(first_frame, num_frames)

    def discard(self) -> None:
        for policy in self.everyone:
            policy.discard()

    def bytes_used(self) -> int:
        return self.leader.bytes_used()

    def slots_used(self) -> int:
        return self.leader.slots_used()

    def capacity_bytes(self) -> int | None:
        return self.leader.capacity_bytes()

    def state_dict(self) -> dict[str, Any]:
        return {"policies": [policy.state_dict() for policy in self.everyone]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for policy, state in zip(self.everyone, saved["policies"], strict=True):
            policy.load_state_dict(state)


def extend_trajectory(rollout: Rollout, history: Tensor, actions: Tensor | None, num_frames: int) -> Tensor:
    """True `history` [B, F, C, h, w] followed by `num_frames` frames that `rollout` generates: [B, F + n, C, h, w].

    `actions` [B, >= F + num_frames] covers both parts.
    """
    past = history.shape[1]
    if past:
        rollout.prefill(history, None if actions is None else actions[:, :past])
    chunks = rollout.generate(num_frames, None if actions is None else actions[:, past:])
    return torch.cat([history.to(rollout.device), *chunks], dim=1)


def lockstep_a(
    teacher: Rollout,
    students: dict[str, Rollout],
    trajectory: Tensor,
    actions: Tensor | None,
    start: int,
    *,
    done: int = 0,
    look_at: Collection[int] = (),
    probe: Probe | None = None,
) -> Iterator[tuple[int, str, Tensor]]:
    """Protocol A for several methods at once.

    `teacher`'s state holds a `TeeCache` whose followers are the caches of the `students`. Yields
    (first frame of the chunk, method, denoised chunk [B, n, C, h, w]) for every chunk from frame `start` on. Chunks
    that start at a frame of `look_at` are then denoised by the teacher, with the `probe` among its recorders active.
    The first `done` chunks are committed and not denoised: only commits change a cache, so what follows is the same. Of
    loops with several chunks in flight they are denoised again, and not yielded.
    Prompt buckets of committed tokens are the teacher's, too.
    """
    step, several = teacher.loop.chunk_frames, teacher.loop.most_in_flight > 1
    for student in students.values():
        if student.state.tags is not None:
            teacher.state.recorders.append(CommittedTags(student.state.tags))
    following = start + done * step
    begin = replay(teacher, trajectory, actions, start, 0 if several else done)
    for first in range(begin, trajectory.shape[1], step):
        needed, again = _actions(actions, first, teacher.loop.frames_in_flight), first < following
        chunks: dict[str, Tensor] = {}
        for name, student in students.items():
            student.follow(teacher)
            with student.state.unmeasured() if again else nullcontext():
                chunks[name] = student.denoise(needed)
        looks = probe is not None and first in look_at and not again
        if probe is not None:
            probe.active = looks
        if looks or several:  # last: it replays calls with the tags that the students had
            teacher.denoise(needed)
        if probe is not None:
            probe.active = False
        if not again:
            for name, chunk in chunks.items():
                yield first, name, chunk
        teacher.commit(trajectory[:, first : first + step], _actions(actions, first, step))


def lockstep_b(
    rollout: Rollout, trajectory: Tensor, actions: Tensor | None, start: int, *, done: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Protocol B: yields (first frame, denoised chunk [B, n, C, h, w]) for every chunk from frame `start` on.

    The first `done` chunks are committed and not denoised, as in `lockstep_a`, unless the loop has several chunks in
    flight, or a selector is on in commit passes: what it does there may hang on the passes before.
    """
    step = rollout.loop.chunk_frames
    selectors = (rollout.state.self_selector, rollout.state.cross_selector)
    again = rollout.loop.most_in_flight > 1 or not all(selector.commit_dense for selector in selectors)
    following = replay(rollout, trajectory, actions, start, done, denoised=again)
    for first in range(following, trajectory.shape[1], step):
        yield first, rollout.denoise(_actions(actions, first, rollout.loop.frames_in_flight))
        rollout.commit(trajectory[:, first : first + step], _actions(actions, first, step))


def replay(
    rollout: Rollout,
    trajectory: Tensor,
    actions: Tensor | None,
    start: int,
    done: int,
    *,
    denoised: bool = False,
) -> int:
    """Commit the true history of `start` frames and the `done` chunks after it; the frame that comes next.

    With `denoised` each of these chunks is denoised, too, before it is committed.
    """
    step = rollout.loop.chunk_frames
    if start:
        rollout.prefill(trajectory[:, :start], None if actions is None else actions[:, :start])
    following = start + done * step
    for first in range(start, following, step):
        if denoised:
            rollout.denoise(_actions(actions, first, rollout.loop.frames_in_flight))
        rollout.commit(trajectory[:, first : first + step], _actions(actions, first, step))
    return following


def _actions(actions: Tensor | None, first: int, frames: int) -> Tensor | None:
    return None if actions is None else actions[:, first : first + frames]
