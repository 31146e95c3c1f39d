"""How full of same-bucket pairs the blocks are that a plan executes: what block sparsity costs beyond the buckets."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent


class FillRecorder:
    """Recorder of plans made of buckets: same-bucket pairs / executed pairs of queries and cached keys.

    Every call and head weighs the same; the current chunk, which is always read, does not count.
    """

    def __init__(self) -> None:
        self._fills: list[Tensor] = []

    def on_attend(self, event: AttendEvent) -> None:
        """Look at one call."""
        plan = event.plan
        if plan is None or plan.bucket_pairs is None:
            return
        cached = plan.executed_pairs() - plan.num_queries**2  # the queries are the current chunk
        self._fills.append(plan.bucket_pairs / torch.where(cached > 0, cached, torch.nan))

    def scores(self) -> dict[str, list[float]]:
        """`block_fill`, one number a video, of the calls since the last time; empty if no plan had buckets."""
        found, self._fills = self._fills, []
        return {"block_fill": torch.stack(found).nanmean((0, 2)).tolist()} if found else {}
