"""What measures see of a rollout's attention calls."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastar.attention.context import PassContext, Stream
from fastar.attention.text import Selection
from fastar.engines.plan import BlockPlan


@dataclass(frozen=True)
class AttendEvent:
    """One attention call as it was executed, for measures that need queries, keys or plans.

    Attributes:
        stream, layer, context: where.
        q, k, v: what the engine got (q and k roped in the self stream), BHLD.
        log_count: bias of merged (> 0) and empty (-inf) slots, [B, H, Lk]; None if all counts are 1.
        plan: executed blocks; None means all pairs.
        out: the result, [B, H, Lq, D].
        candidates: keys of this stream before the selector, the current chunk included.
        selection: of the prompt's tokens, in the text stream.
    """

    stream: Stream
    layer: int
    context: PassContext
    q: Tensor
    k: Tensor
    v: Tensor
    log_count: Tensor | None
    plan: BlockPlan | None
    out: Tensor
    candidates: int
    selection: Selection | None = None

    @property
    def current_keys(self) -> int:
        """Keys of the pass itself in the self stream: the last ones, after those of the cache."""
        first, stop = self.context.visible
        return self.q.shape[2] // self.context.num_frames * (stop - first)


class Recorder(Protocol):
    """Sees every attention call of a rollout."""

    def on_attend(self, event: AttendEvent) -> None:
        """Called after each attention call, inside the pass."""
