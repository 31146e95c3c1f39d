"""The merging primitives against loops, and the plan of `TempCache` against a search by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastar.ann import ExactMatcher
from fastar.cache.allocation import Candidates, choose, match, renew
from fastar.cache.merge import (
    Weighting,
    find_roots,
    group_mean,
    group_medoid,
    merge_cost,
    pair_weight,
    segment_sum,
)

SEEDS = st.integers(0, 2**16)


def random_parents(seed: int, problems: int, count: int) -> Tensor:
    """Every slot points at itself or at a newer one, so that there are chains and joins."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(0, 4, (problems, count), generator=generator)
    return (torch.arange(count) + step).clamp_max(count - 1)


def members(root: Tensor, problem: int) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for slot, end in enumerate(root[problem].tolist()):
        groups.setdefault(end, []).append(slot)
    return groups


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 40))
def test_chains_end_at_their_newest_member(seed: int, count: int) -> None:
    parent = random_parents(seed, 3, count)
    root = find_roots(parent)
    for problem in range(3):
        for slot in range(count):
            end = slot
            while parent[problem, end] != end:
                end = int(parent[problem, end])
            assert root[problem, slot] == end


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 30))
def test_group_reductions_equal_loops(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    root = find_roots(random_parents(seed, 2, count))
    most = int((root != torch.arange(count)).sum(1).max())
    x, weight = torch.randn(2, count, 5), torch.randint(1, 9, (2, count)).float()
    total, medoid = segment_sum(x, root, most), group_medoid(x, root, weight, most)
    mean, mass = group_mean(x, root, weight, most)
    for problem in range(2):
        groups = members(root, problem)
        for slot in range(count):
            if slot not in groups:
                assert not total[problem, slot].any() and medoid[problem, slot] == slot
                continue
            rows, w = x[problem, groups[slot]], weight[problem, groups[slot]]
            centre = (rows * w[:, None]).sum(0) / w.sum()
            torch.testing.assert_close(total[problem, slot], rows.sum(0))
            torch.testing.assert_close(mean[problem, slot], centre)
            assert mass[problem, slot] == w.sum()
            nearest = min(groups[slot], key=lambda i: float((x[problem, i] - centre).norm()))
            chosen = x[problem, medoid[problem, slot]]
            assert medoid[problem, slot] in groups[slot]
            torch.testing.assert_close((chosen - centre).norm(), (x[problem, nearest] - centre).norm())


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=st.integers(2, 40))
def test_the_lemma_holds_for_any_group_sizes(seed: int, count: int) -> None:
    """Groups of equal keys: one key, the mean value and + log m leave attention as it was (paper, TempCache lemma)."""
    torch.manual_seed(seed)
    root = find_roots(random_parents(seed, 2, count))
    k = torch.randn(2, count, 8, dtype=torch.double)
    k = k.gather(1, root[..., None].expand_as(k))  # members of a group share their root's key
    v, q = torch.randn(2, count, 8, dtype=torch.double), torch.randn(2, 5, 8, dtype=torch.double)
    expected = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    ones = torch.ones(2, count, dtype=torch.double)
    size = segment_sum(ones[..., None], root, count)[..., 0]
    logits = q @ k.mT / math.sqrt(8) + size.log()[:, None]  # log 0 removes those that are no root
    torch.testing.assert_close(logits.softmax(-1) @ group_mean(v, root, ones, count)[0], expected)


def test_weights_are_what_they_are_called() -> None:
    older, newer = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 12.0])
    assert pair_weight(older, newer, "none").tolist() == [1, 1]
    assert pair_weight(older, newer, "older").tolist() == [1, 4]
    assert pair_weight(older, newer, "ward").tolist() == [0.5, 3]
    torch.testing.assert_close(pair_weight(older, newer, "root_ward"), torch.tensor([0.5, 3]).sqrt())
    # Ward: the growth of the sum of squares about the group means
    x = torch.randn(16, 3)
    groups = (x[:4], x[4:])

    def spread(rows: Tensor) -> Tensor:
        return (rows - rows.mean(0)).square().sum()

    means = torch.stack([g.mean(0) for g in groups])[None]
    cost = merge_cost(means, torch.tensor([[4.0, 12.0]]), torch.tensor([[1, -1]]), "ward")
    torch.testing.assert_close(cost[0, 0], spread(x) - spread(groups[0]) - spread(groups[1]))
    assert cost[0, 1] == math.inf


def fresh(features: Tensor) -> Candidates:
    shape = features.shape[:2]
    return Candidates(features, torch.ones(shape), torch.full(shape, -1), features.shape[-1] // 2)


@pytest.mark.parametrize("weighting", ["none", "root_ward"])
def test_partners_are_the_cheapest_newer_slots_of_later_frames(weighting: Weighting) -> None:
    features, frame = torch.randn(3, 24, 6), 4
    slots = fresh(features)
    for known, size in ((0, 8), (8, 16), (16, 24)):  # three commits of two frames
        part = Candidates(features[:, :size], slots.count[:, :size], slots.partner[:, :size], 3)
        found, cost = match(part, known, frame, ExactMatcher(), weighting)
        slots.partner[:, :size] = found
    index = torch.arange(24)
    later = index // frame > (index // frame)[:, None]
    distance = torch.cdist(features, features).masked_fill(~later, math.inf)
    expected = distance.argmin(-1)
    assert torch.equal(slots.partner[:, :-frame], expected[:, :-frame])
    assert (slots.partner[:, -frame:] == -1).all() and (cost[:, -frame:] == math.inf).all()


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rounds=st.integers(1, 4), surplus=st.integers(1, 19))
def test_exactly_as_many_merges_as_asked_for(seed: int, rounds: int, surplus: int) -> None:
    torch.manual_seed(seed)
    slots = fresh(torch.randn(3, 24, 6))
    slots.partner, cost = match(slots, 0, 4, ExactMatcher(), "none")
    root, gone, partner = choose(slots, cost, surplus, rounds, "none", keep_last_key=False)
    assert (gone.sum(1) == surplus).all()
    assert torch.equal(gone, root != torch.arange(24))
    assert not gone.gather(1, root).any()
    assert not gone.gather(1, partner.clamp_min(0))[partner >= 0].any()
    if rounds == 1:
        cheapest = cost.argsort(dim=1, stable=True)[:, :surplus]
        assert torch.equal(gone.nonzero()[:, 1].view(3, -1), cheapest.sort().values)


def test_without_partners_the_oldest_are_dropped() -> None:
    slots = fresh(torch.randn(2, 8, 6))
    root, gone, _ = choose(slots, torch.full((2, 8), math.inf), 3, 2, "none", keep_last_key=True)
    assert gone.tolist() == [[True] * 3 + [False] * 5] * 2
    assert torch.equal(root, torch.arange(8).expand(2, -1))


def test_renewed_partners_are_the_cheapest_newer_ones() -> None:
    slots = fresh(torch.randn(2, 20, 6))
    slots.count = torch.randint(1, 9, (2, 20)).float()
    slots.partner = torch.arange(1, 21).expand(2, -1).clone()
    slots.partner[:, -1] = -1
    before = torch.zeros(2, 20)
    partner = renew(slots, before, 15, 5, "ward")
    distance = torch.cdist(slots.features, slots.features)
    nearest = distance.masked_fill(torch.arange(20)[:, None] >= torch.arange(20), math.inf).argmin(-1)
    cost = [merge_cost(slots.features, slots.count, p, "ward") for p in (nearest, slots.partner)]
    expected = torch.where(cost[0] < cost[1], nearest, slots.partner)
    assert torch.equal(partner[:, :15], expected[:, :15]) and (partner != slots.partner).any()
    assert torch.equal(partner[:, 15:], slots.partner[:, 15:])
    few = renew(slots, before, 4, 5, "ward")
    assert ((few != slots.partner).sum(1) <= 4).all()
