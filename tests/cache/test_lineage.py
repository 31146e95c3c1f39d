"""Every token is followed to the slot that stands for it, whatever the policy does."""

from functools import partial
from typing import Any

import pytest
import torch

from fastar import cache
from fastar.cache.lineage import DROPPED, Lineage

from .worlds import BATCH, FLOAT, HEADS, TOKENS, bound, commit, scene_chunks

MERGING: dict[str, Any] = {
    "mean": lambda: cache.TempCache(budget_frames=11, **FLOAT),
    "last": lambda: cache.TempCache(budget_frames=11, key="last", rounds=3, **FLOAT),
    "medoid": lambda: cache.TempCache(budget_frames=11, key="medoid", **FLOAT),
    "shared": lambda: cache.TempCache(budget_frames=11, per_head=False, **FLOAT),
    "regions": lambda: cache.TempCache(budget_frames=11, sink_frames=1, recent_frames=2, **FLOAT),
    "headwise": lambda: cache.HeadwiseCache(
        policy=partial(cache.TempCache, moment="diagonal", **FLOAT),
        head_errors=cache.HeadErrors((4, 10), (((0.1, 0.1), (0.9, 0.0)),)),
        budget_frames=18,
    ),
    "paper": lambda: cache.TempCachePaper(threshold=0.5, **FLOAT),
    "paper_medoid": lambda: cache.TempCachePaper(threshold=0.5, key="medoid", sink_frames=1, **FLOAT),
}


def followed(policy: Any, chunks: list[cache.Staged]) -> torch.Tensor:
    lineage = Lineage()
    policy.follow(lineage)
    for chunk in chunks:
        commit(policy, chunk)
    assignment: torch.Tensor = lineage.assignment(0, policy.view(0))
    return assignment


@pytest.mark.parametrize("name", list(MERGING))
def test_members_of_a_slot_are_those_it_counts_and_averages(name: str) -> None:
    chunks = scene_chunks(8, places=3, noise=0.3)
    policy = bound(MERGING[name](), layers=1)
    assignment, view = followed(policy, chunks), policy.view(0)
    assert assignment.shape == (BATCH, HEADS, 16 * TOKENS)
    values = torch.cat([chunk.v for chunk in chunks], 2)
    kept = (assignment != DROPPED)[..., None]
    index = assignment.clamp_min(0)
    count = torch.zeros(view.v.shape[:3]).scatter_add_(2, index, kept[..., 0].float())
    if view.log_count is not None:
        torch.testing.assert_close(count, view.log_count.exp().round())
    total = torch.zeros_like(view.v).scatter_add_(2, index[..., None].expand_as(values), values * kept)
    live = count > 0
    assert (live.sum(-1) < 16 * TOKENS).all() and live.any()
    torch.testing.assert_close(total[live] / count[live][:, None], view.v[live], atol=1e-4, rtol=1e-4)


def test_a_token_that_was_evicted_is_dropped() -> None:
    policy = bound(cache.WindowCache(budget_frames=8.5, **FLOAT), layers=1)
    chunks = scene_chunks(6)
    assignment = followed(policy, chunks)
    slots = policy.view(0).k.shape[2]
    assert (assignment[..., :-slots] == DROPPED).all()
    assert torch.equal(assignment[..., -slots:], torch.arange(slots).expand(BATCH, HEADS, -1))
    assert (followed(bound(cache.EmptyCache(), layers=1), chunks) == DROPPED).all()


def test_rewritten_frames_are_refused() -> None:
    policy = bound(cache.DenseCache(**FLOAT), layers=1)
    chunks = scene_chunks(3)
    followed(policy, chunks)
    policy.drop_from(int(chunks[-1].positions[0, 0]))
    with pytest.raises(ValueError, match="never rewrite a frame"):
        commit(policy, chunks[-1])
