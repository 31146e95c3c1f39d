"""How full blocks are, against a count of all pairs of tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastar.ann import LSHBucketizer
from fastar.attention.context import PassContext, PassKind
from fastar.attention.events import AttendEvent
from fastar.engines.plan import WILDCARD, BlockPlan
from fastar.metrics.block_fill import FillRecorder
from fastar.sparsity import AnnSA, RandomBlocks, SelectRequest

BATCH, HEADS, CURRENT, CACHED, DIM = 2, 2, 12, 50, 8


def request(seed: int = 0, cached: int = CACHED) -> SelectRequest:
    """Prompt tags of five kinds, some keys with none; a third of the cached slots empty, one head nearly all."""
    generator = torch.Generator().manual_seed(seed)
    lead, keys = (BATCH, HEADS), cached + CURRENT
    log_count = torch.zeros(*lead, keys)
    log_count[..., :cached].masked_fill_(torch.rand(*lead, cached, generator=generator) < 0.3, -torch.inf)
    log_count[0, 1, : max(0, cached - 3)] = -torch.inf
    return SelectRequest(
        layer=0,
        context=PassContext(PassKind.DENOISE, 8, 2, (500.0,) * 2, step=3, num_steps=4),
        q=torch.randn(*lead, CURRENT, DIM, generator=generator),
        k=torch.randn(*lead, keys, DIM, generator=generator),
        num_current=CURRENT,
        log_count=log_count,
        text_tags=torch.randint(0, 5, (*lead, CURRENT), generator=generator),
        key_tags=torch.randint(WILDCARD, 5, (*lead, keys), generator=generator),
    )


def plan_of(given: SelectRequest, *, source: str = "prompt", density: float | None = 0.4) -> BlockPlan:
    selector = AnnSA(
        bucketizer=LSHBucketizer(bits=2), source=source, density=density, block_q=4, block_k=8  # type: ignore[arg-type]
    )  # fmt: skip
    plan = selector.plan(given)
    assert plan is not None
    return plan


def by_hand(plan: BlockPlan, given: SelectRequest, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Same-bucket and all pairs with cached keys in the executed blocks, [B, H] each, pair by pair."""
    assert given.log_count is not None
    cached = given.k.shape[2] - given.num_current
    executed = replace(plan, query_tags=None, key_tags=None).token_mask()
    same, whole = torch.zeros(BATCH, HEADS), torch.zeros(BATCH, HEADS)
    for b, h, i, j in executed[..., :cached].nonzero().tolist():
        assert given.log_count[b, h, j] > -torch.inf
        whole[b, h] += 1
        same[b, h] += int(queries[b, h, i] == keys[b, h, j] or keys[b, h, j] == WILDCARD)
    return same, whole


def event(plan: BlockPlan | None, given: SelectRequest) -> AttendEvent:
    q, k = given.q, given.k
    return AttendEvent("self", 0, given.context, q, k, k, given.log_count, plan, q, k.shape[2])


@pytest.mark.parametrize("source", ["prompt", "content"])
@pytest.mark.parametrize("density", [None, 0.2, 0.6])
def test_bucket_pairs_are_the_same_bucket_pairs_of_the_executed_blocks(
    source: str, density: float | None
) -> None:
    given = request()
    plan = plan_of(given, source=source, density=density)
    tags = (given.text_tags, given.key_tags)
    if source == "content":
        assert given.log_count is not None
        live = (given.log_count > -torch.inf).expand(given.k.shape[:3]).flatten(0, 1)
        q, k = given.q.flatten(0, 1), given.k.flatten(0, 1)
        buckets = LSHBucketizer(bits=2).buckets(q, k, valid=live)
        tags = (buckets[0].unflatten(0, (BATCH, HEADS)), buckets[1].unflatten(0, (BATCH, HEADS)))
    assert tags[0] is not None and tags[1] is not None and plan.bucket_pairs is not None
    same, whole = by_hand(plan, given, tags[0], tags[1])
    assert torch.equal(plan.bucket_pairs.float(), same) and (same < whole).any() and same.max() > 0
    if density is None:  # the letter of the paper: no same-bucket pair is left out
        assert torch.equal(plan.token_mask()[..., :CACHED].sum((2, 3)).float(), same)
    one = plan.of_heads(slice(1, 2))
    assert one.bucket_pairs is not None and torch.equal(one.bucket_pairs, plan.bucket_pairs[:, 1:])


def test_fill_is_their_share_a_call_and_head_alike() -> None:
    recorder, expected = FillRecorder(), []
    for seed, density in ((0, 0.3), (1, None), (2, 0.7)):
        given = request(seed)
        plan = plan_of(given, density=density)
        assert given.text_tags is not None and given.key_tags is not None
        same, whole = by_hand(plan, given, given.text_tags, given.key_tags)
        expected.append(same / whole)
        recorder.on_attend(event(plan, given))
        recorder.on_attend(event(None, given))
    assert recorder.scores()["block_fill"] == pytest.approx(torch.stack(expected).nanmean((0, 2)).tolist())
    assert recorder.scores() == {}


def test_plans_without_buckets_have_no_fill_and_those_without_a_past_are_left_out() -> None:
    recorder, given = FillRecorder(), request()
    recorder.on_attend(event(RandomBlocks(density=0.3, block_q=4, block_k=8).plan(given), given))
    assert recorder.scores() == {}
    first = request(cached=0)
    recorder.on_attend(event(plan_of(first), first))
    assert all(math.isnan(value) for value in recorder.scores()["block_fill"])
    plan = plan_of(given)
    for each, call in ((plan_of(first), first), (plan, given)):
        recorder.on_attend(event(each, call))
    found = recorder.scores()
    recorder.on_attend(event(plan, given))
    assert found == recorder.scores()
