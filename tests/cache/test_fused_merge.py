"""The parts of a fused merge against what PyTorch finds: the lowest costs, groups and their means, holes filled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastar.cache import fused_merge, merge

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("only_where_triton_runs")


def whole(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(-3, 4, shape).float().to(device)


def first(cost: Tensor, number: int) -> Tensor:
    """Places of the `number` lowest, ascending."""
    return cost.argsort(dim=1, stable=True)[:, :number].sort(dim=1).values


@pytest.mark.parametrize(("size", "number"), [(1, 1), (16, 5), (37, 36), (50, 50)])
def test_the_lowest_are_those_that_sorting_finds(size: int, number: int, device: torch.device) -> None:
    cost = whole(2, size, device=device)
    cost[cost == 3] = math.inf
    cost[0, :2] = torch.tensor([-0.5, 1e-30])[:size]
    gone = (torch.rand(2, size) < 0.3).to(torch.uint8).to(device)
    order = first(cost.masked_fill(gone != 0, math.nan), number)
    chosen, rows = fused_merge.lowest(cost, number, gone)
    assert torch.equal(rows.long(), order)
    assert torch.equal(chosen.nonzero()[:, 1].view(2, number), order)
    chosen, rows = fused_merge.lowest(cost, number)
    assert torch.equal(rows.long(), first(cost, number))
    rest = fused_merge.places(chosen, size - number, wanted=False)
    assert torch.equal(rest.long(), (chosen == 0).nonzero()[:, 1].view(2, -1))
    assert torch.equal(fused_merge.places(chosen, number, wanted=True), rows)


@pytest.mark.parametrize(("size", "block"), [(30, 16), (9000, 4096)])
def test_rows_longer_than_a_block(
    size: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu" and size > 100:
        pytest.skip("the interpreter would take long")
    monkeypatch.setattr(fused_merge, "_BLOCK", block)
    cost = whole(2, size, device=device)
    chosen, rows = fused_merge.lowest(cost, size // 2)
    assert torch.equal(rows.long(), first(cost, size // 2))
    assert torch.equal(fused_merge.places(chosen, size // 2, wanted=True), rows)


def test_groups_are_folded_into_their_means(device: torch.device) -> None:
    """Chains, joins and one long run, with columns that stay."""
    size, width, first = 60, 20, 4
    partner = (torch.arange(size) + torch.randint(1, 5, (2, size))).clamp_max(size - 1)
    partner[1, :40] = 59
    chosen = torch.rand(2, size) < 0.7
    chosen[:, -1] = False
    chosen[:, 0] = True
    partner, flags = partner.to(torch.int32).to(device), chosen.to(torch.uint8).to(device)
    own = torch.arange(size, device=device)
    root = fused_merge.find_roots(flags, partner)
    assert torch.equal(root.long(), merge.find_roots(torch.where(chosen.to(device), partner.long(), own)))
    x, count = torch.randn(2, size, width, device=device), torch.randint(1, 9, (2, size)).float().to(device)
    mean, mass = merge.group_mean(x, root.long(), count, size)
    for problem in range(2):
        rows = chosen[problem].nonzero().T.to(torch.int32).to(device)
        runs = fused_merge.Runs.of(rows, root[problem, None])
        folded = x[problem, None].clone()
        total = runs.fold(folded, count[problem, None], first=first, total=True)
        stays = ~chosen[problem]
        torch.testing.assert_close(folded[0, stays, first:], mean[problem, stays, first:])
        assert torch.equal(folded[0, :, :first], x[problem, :, :first])
        assert torch.equal(folded[0, ~stays], x[problem, ~stays])
        assert torch.equal(total[0, stays], mass[problem, stays])


def test_the_last_slots_fill_the_holes(device: torch.device) -> None:
    for shape, size in (((2, 300, 70), 300), ((2, 40), 40)):
        wide = whole(1, *shape, device=device)
        x = wide[..., :65] if len(shape) == 3 else wide
        leave = torch.rand(2, size).argsort(1)[:, : size // 3].sort(1).values.to(torch.int32).to(device)
        gone = torch.zeros(2, size, dtype=torch.uint8, device=device).scatter(1, leave.long(), 1)
        before, stay = wide.clone(), size - size // 3
        place = fused_merge.places_of_last(gone, leave)
        fused_merge.fill(x, place)
        for n in range(2):
            holes, last = (gone[n, :stay] != 0).nonzero()[:, 0], (gone[n, stay:] == 0).nonzero()[:, 0] + stay
            own = torch.arange(stay, device=device).scatter(0, holes, last)
            assert torch.equal(
                x[0, n, :stay], before[0, n, own][..., :65] if x is not wide else before[0, n, own]
            )
        assert torch.equal(wide[:, :, stay:], before[:, :, stay:])
        assert x is wide or torch.equal(wide[..., 65:], before[..., 65:])
