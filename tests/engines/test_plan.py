"""Pair counts and masks of block plans against counting by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastar.engines.plan import WILDCARD, BlockPlan, inverse_order, share_tag, take_rows

from .conftest import Draw


def test_inverse_order(draw: Draw) -> None:
    order = draw.order(2, 3, 17)
    assert torch.equal(order.gather(-1, inverse_order(order)), torch.arange(17).expand(2, 3, 17))


def test_executed_pairs_counts_the_token_mask(draw: Draw) -> None:
    """Blocks at the ends are clipped to the tokens that exist."""
    plan = draw.plan(2, 3, 50, 133, 16, 32)
    assert torch.equal(plan.executed_pairs(), plan.token_mask().sum((-1, -2)))
    assert torch.equal(plan.dense_pairs(), torch.full((2, 3), 50 * 133))


def test_empty_slots_are_never_counted(draw: Draw) -> None:
    base = draw.plan(1, 2, 20, 40, 8, 16)
    live = torch.tensor([[35, 16]])
    plan = BlockPlan(base.query_order, base.key_order, 8, 16, base.block_mask, live_keys=live)
    mask = plan.token_mask()
    assert torch.equal(plan.executed_pairs(), mask.sum((-1, -2)))
    assert torch.equal(plan.dense_pairs(), live * 20)
    for head in range(2):
        assert not mask[0, head][:, base.key_order[0, head, int(live[0, head]) :]].any()


def test_token_mask_follows_the_orders() -> None:
    plan = BlockPlan(
        query_order=torch.tensor([[[2, 0, 1]]]),
        key_order=torch.tensor([[[3, 1, 0, 2]]]),
        block_q=2,
        block_k=2,
        block_mask=torch.tensor([[[[True, False], [False, True]]]]),
    )
    # queries 2, 0 read keys 3, 1; query 1 reads keys 0, 2
    expected = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(plan.token_mask()[0, 0], expected)
    assert plan.density().item() == pytest.approx(6 / 12)


def test_an_order_of_none_is_the_identity(draw: Draw) -> None:
    base = draw.plan(1, 2, 20, 40, 8, 16)
    places = [torch.arange(length).expand(1, 2, length) for length in (20, 40)]
    named = BlockPlan(*places, 8, 16, base.block_mask)
    unnamed = BlockPlan(None, None, 8, 16, base.block_mask, lengths=(20, 40))
    assert torch.equal(unnamed.token_mask(), named.token_mask())
    assert torch.equal(unnamed.executed_pairs(), named.executed_pairs())
    assert torch.equal(unnamed.query_index, places[0]) and torch.equal(unnamed.key_index, places[1])
    assert unnamed.of_heads(slice(1, 2)).num_keys == 40
    with pytest.raises(ValueError, match="needs lengths"):
        BlockPlan(None, base.key_order, 8, 16, base.block_mask)


def test_lists_name_the_blocks_of_the_mask_in_ascending_order(draw: Draw) -> None:
    plan = draw.plan(2, 3, 50, 133, 16, 32)
    counts, indices = plan.listed()
    assert counts.dtype == indices.dtype == torch.int32
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        row = tuple(place)
        assert indices[row][: counts[row]].tolist() == plan.block_mask[row].nonzero().flatten().tolist()
    given = dataclasses.replace(plan, block_lists=(counts + 1, indices)).of_heads(slice(1, 3))
    assert torch.equal(given.listed()[0], counts[:, 1:] + 1), "given lists are not made again"


def test_rows_are_taken_head_by_head(draw: Draw) -> None:
    x, order = draw.normal(2, 3, 17, 5), draw.order(2, 3, 17)
    expected = x.gather(2, order[..., None].expand_as(x))
    assert torch.equal(take_rows(x, order), expected)
    assert torch.equal(take_rows(x.transpose(1, 2).contiguous().transpose(1, 2), order), expected)
    assert take_rows(x, None) is x


def test_tags_share() -> None:
    assert share_tag(torch.tensor([1, 1, WILDCARD, 2]), torch.tensor([1, 2, 5, WILDCARD])).tolist() == [
        True, False, True, True,
    ]  # fmt: skip


def test_a_mask_of_the_wrong_shape_is_refused(draw: Draw) -> None:
    with pytest.raises(ValueError, match=r"needs a block mask of \(1, 1, 3, 2\)"):
        BlockPlan(draw.order(1, 1, 20), draw.order(1, 1, 30), 8, 16, torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_tags_come_in_pairs(draw: Draw) -> None:
    with pytest.raises(ValueError, match="query_tags and key_tags together"):
        BlockPlan(
            draw.order(1, 1, 8), draw.order(1, 1, 16), 8, 16, torch.ones(1, 1, 1, 1, dtype=torch.bool),
            query_tags=torch.zeros(1, 1, 8, dtype=torch.long),
        )  # fmt: skip
