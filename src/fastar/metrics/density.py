"""How much of dense attention's work and memory a method needs.

Density counts executed query-key pairs, of every layer and every pass of a chunk (dense steps, dense layers and the
commit included), against the pairs of dense attention with an unbounded cache at the same passes. It is a curve over
the rollout: a bounded cache's density falls with length, so a number without its length says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fastar.attention.context import PassKind, Stream

if TYPE_CHECKING:
    from fastar.attention.events import AttendEvent


@dataclass(frozen=True)
class ChunkDensity:
    """Pairs of one chunk, summed over passes, layers, batch and heads."""

    frame: int
    executed: int
    dense: int

    @property
    def density(self) -> float:
        """Executed / dense."""
        return self.executed / self.dense


class DensityRecorder:
    """Counts pairs of one stream; give it to `AttentionState(recorders=[...])`.

    Counts stay on the device until `curve` is called, so recording does not make the GPU wait.

    Args:
        tokens_per_frame: of the backbone; with it the unbounded dense cache's length is known.
        stream: self, text, image, mouse or keyboard. For streams other than self, dense means all candidates.
        kinds: passes that count. Prefill is left out: it is not part of generating.
    """

    def __init__(
        self,
        *,
        tokens_per_frame: int,
        stream: Stream = "self",
        kinds: tuple[PassKind, ...] = (PassKind.DENOISE, PassKind.COMMIT, PassKind.REWRITE),
    ) -> None:
        self.tokens_per_frame, self.stream, self.kinds = tokens_per_frame, stream, kinds
        self._executed: dict[int, Tensor | int] = {}
        self._dense: dict[int, int] = {}

    def on_attend(self, event: AttendEvent) -> None:
        """Count one attention call."""
        context = event.context
        if event.stream != self.stream or context.kind not in self.kinds:
            return
        batch, heads, queries, _ = event.q.shape
        keys = event.candidates
        if self.stream == "self":
            keys = context.visible[1] * self.tokens_per_frame
        frame = context.pass_frames[0]
        self._executed[frame] = self._executed.get(frame, 0) + executed_pairs(event)
        self._dense[frame] = self._dense.get(frame, 0) + batch * heads * queries * keys

    def curve(self) -> list[ChunkDensity]:
        """One point per chunk, by frame (latent frame index of the chunk's first frame).

        Passes over several chunks in flight count for the oldest of them, which leaves when they are done.
        """
        return [
            ChunkDensity(frame, int(self._executed[frame]), self._dense[frame])
            for frame in sorted(self._dense)
        ]

    def mean(self) -> float:
        """Mean of the curve: every chunk weighs the same.

        Raises:
            ValueError: nothing was recorded.
        """
        curve = self.curve()
        if not curve:
            raise ValueError(
                "no attention call was recorded: give the recorder to AttentionState before the rollout"
            )
        return sum(point.density for point in curve) / len(curve)

    def pooled(self) -> float:
        """All executed / all dense pairs of the rollout: long chunks of work weigh more."""
        curve = self.curve()
        return sum(point.executed for point in curve) / sum(point.dense for point in curve)

    def reset(self) -> None:
        """Forget everything."""
        self._executed.clear()
        self._dense.clear()


def executed_pairs(event: AttendEvent) -> Tensor | int:
    """Pairs the engine executed in one call, on the call's device if it has to be asked. Empty slots do not count."""
    if event.plan is not None:
        return event.plan.executed_pairs().sum()
    batch, heads, queries, _ = event.q.shape
    if event.log_count is None:
        return batch * heads * queries * event.k.shape[2]
    live = event.log_count.expand(batch, heads, event.k.shape[2]) > float("-inf")
    return live.sum() * queries


def dense_slots(*, frames: int, tokens_per_frame: int) -> int:
    """Slots per head of an unbounded dense cache after `frames` latent frames; compare `CachePolicy.slots_used`."""
    return frames * tokens_per_frame


def dense_bytes(
    *, frames: int, tokens_per_frame: int, layers: int, batch: int, heads: int, head_dim: int
) -> int:
    """Bytes of the same cache over all layers, videos and heads, key and value in bfloat16."""
    slots = dense_slots(frames=frames, tokens_per_frame=tokens_per_frame) * layers * batch * heads
    return slots * 2 * head_dim * 2
