"""Matches of tokens held against motion that is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastar.attention.rope import grid_positions
from fastar.metrics.redundancy import CorrespondenceAccuracy
from fastar.metrics.redundancy.correspondence import group_names, true_tokens

GRID = (2, 6)
TOKENS = GRID[0] * GRID[1]
RIGHT, SAME_PLACE, PREVIOUS, ANY = 0, 1, 0, 1


class Panning:
    """Everything moves to the right by one column a frame; what comes in on the left is new. Row 1 is "low"."""

    regions = ("high", "low")

    def locate(self, frame: int, earlier: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = grid_positions(0, 1, GRID)[:, 1:].expand(len(earlier), -1, -1).clone()
        places[..., 1] -= frame - torch.tensor(list(earlier))[:, None]
        return places, places[..., 1] >= 0

    def region(self, frame: int) -> Tensor:
        return torch.arange(TOKENS) // GRID[1]


def pattern(frames: int) -> Tensor:
    """A key of its own for every point, seen where it is: [frames * tokens, points]."""
    position = grid_positions(0, frames, GRID)
    point = position[:, 1] * 20 + position[:, 2] - position[:, 0] + 10
    return torch.nn.functional.one_hot(point, 40).float()


def judged(scores: Tensor, *, frames: int = 4, chunk: int = 2) -> Tensor:
    """Accuracy [matchers + 1, searches, distances, groups] of matches by `scores` [N, S] of the last frames."""
    positions = grid_positions(0, frames, GRID)
    truth = true_tokens(Panning(), positions[-chunk * TOKENS :], GRID[1])
    accuracy = CorrespondenceAccuracy(1, 1, num_matchers=1, num_groups=len(group_names(Panning())))
    live = torch.ones(1, len(positions), dtype=torch.bool)
    accuracy.update(0, [scores[None]], positions[None], live, truth)
    return accuracy.compute()[..., 0, 0, :]


def test_keys_that_move_with_the_pattern_are_all_right() -> None:
    keys = pattern(4)
    found = judged(keys[-2 * TOKENS :] @ keys.T)
    assert found[RIGHT].min().item() == 1
    # a token away is not the same, but is within one
    assert (
        found[SAME_PLACE, PREVIOUS, 0].max().item() == 0 and found[SAME_PLACE, PREVIOUS, 1].min().item() == 1
    )


def test_matches_by_place_are_all_wrong() -> None:
    positions = grid_positions(0, 4, GRID)
    place = positions[:, 1] * 6 + positions[:, 2]
    same = (place[-2 * TOKENS :, None] == place).float()
    found = judged(same)
    assert found[RIGHT, PREVIOUS, 0].max().item() == 0 and found[RIGHT, PREVIOUS, 1].min().item() == 1


def test_half_the_groups_may_be_right() -> None:
    keys = pattern(4)
    scores = keys[-2 * TOKENS :] @ keys.T
    low = grid_positions(2, 2, GRID)[:, 1] == 1
    scores[low] *= -1
    found = judged(scores)[RIGHT, PREVIOUS, 0]
    assert dict(zip(group_names(Panning()), found.tolist(), strict=True)) == pytest.approx(
        {"all": 0.5, "moved": 0.5, "high": 1, "low": 0}
    )


def test_points_that_are_new_do_not_count() -> None:
    keys = pattern(2)
    truth = true_tokens(Panning(), grid_positions(0, 2, GRID), GRID[1])
    known = truth.known.view(2, *GRID)
    assert not known[0].any() and not known[1, :, 0].any() and known[1, :, 1:].all()
    found = judged(keys @ keys.T, frames=2)
    assert found[RIGHT].min().item() == 1


def test_the_own_frame_and_later_ones_are_no_past() -> None:
    keys = pattern(4)
    scores = keys[-2 * TOKENS :] @ keys.T
    positions = grid_positions(0, 4, GRID)
    scores[:, positions[:, 0] == 3] += 10  # tempting, and a frame that tokens of frame 3 must not see
    found = judged(scores)
    assert found[RIGHT, PREVIOUS].min().item() == 1 and found[RIGHT, ANY].min().item() == 1
