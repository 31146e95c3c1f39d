"""Similarity of keys in made-up caches whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastar.metrics.redundancy import Drift, EffectiveRank, KeySimilarity
from fastar.metrics.redundancy.keys import logit_change, same_frame_mates
from fastar.metrics.redundancy.lags import lag_bins
from fastar.metrics.redundancy.rank import effective_rank

COSINE, CENTRED, NEAREST, RANDOM = 0, 1, 0, 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compared(
    new: Tensor,
    past: Tensor,
    *,
    new_frames: Tensor | None = None,
    past_frames: Tensor | None = None,
    live: Tensor | None = None,
    values: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tables of one head and layer; keys [N, D] and [S, D], one frame each unless told otherwise."""
    keys = KeySimilarity(1, 1, thresholds=(0.5, 0.9), edges=(0, 1, 2, 4))
    new_frames = torch.full((len(new),), 1) if new_frames is None else new_frames
    past_frames = torch.zeros(len(past), dtype=torch.long) if past_frames is None else past_frames
    live = torch.ones(len(past), dtype=torch.bool) if live is None else live
    new_values, past_values = (new, past) if values is None else values
    keys.update(
        0,
        new[None, None],
        past[None, None],
        new_frames=new_frames,
        past_frames=past_frames[None, None],
        live=live[None, None],
        queries=normal(1, 1, 20, new.shape[1], seed=9),
        new_values=new_values[None, None],
        past_values=past_values[None, None],
        generator=torch.Generator().manual_seed(0),
    )
    return keys.compute()


def test_duplicates_are_found_at_their_lag_and_are_free() -> None:
    past = normal(12, 16)
    frames = torch.arange(3).repeat_interleave(4)
    found = compared(past[4:8], past, new_frames=torch.full((4,), 3), past_frames=frames)
    assert found["identical"].item() == 1
    assert found["cosine"][COSINE, NEAREST].item() == pytest.approx(1)
    assert found["above"][COSINE, NEAREST, 0, 0].tolist() == [1, 1]
    assert found["change"][COSINE, NEAREST].item() == pytest.approx(0, abs=1e-9)
    assert found["value_change"][COSINE, NEAREST].item() == 0
    by_lag = found["by_lag"][COSINE, 0, 0]
    assert by_lag[2].item() == pytest.approx(1)  # frame 1 seen from frame 3: lag 2
    assert by_lag[1].item() < 0.9 and by_lag[0].isnan() and by_lag[3].isnan()
    assert found["cosine"][COSINE, RANDOM].item() < 0.5 and found["change"][COSINE, RANDOM].item() > 0.1


def test_rounding_to_bfloat16_is_free_and_more_is_not() -> None:
    past = normal(10, 32)
    assert compared(past, past.bfloat16().float())["identical"].item() == 1
    assert compared(past, past + 0.02 * normal(10, 32, seed=1))["identical"].item() == 0


def test_orthogonal_keys_are_not_similar() -> None:
    axes = torch.eye(8)
    found = compared(axes[:4], axes[4:])
    assert found["cosine"].flatten()[0].item() == 0 and found["identical"].item() == 0
    assert found["above"][COSINE].max().item() == 0


def test_a_mean_that_all_keys_share_is_no_redundancy() -> None:
    mean = 20 * torch.ones(32)
    found = compared(mean + normal(30, 32), mean + normal(30, 32, seed=1))
    assert (
        found["above"][COSINE, NEAREST, 0, 0, 1].item() == 1 == found["above"][COSINE, RANDOM, 0, 0, 1].item()
    )
    assert found["above"][CENTRED, NEAREST, 0, 0, 1].item() == 0
    assert abs(found["cosine"][CENTRED, RANDOM].item()) < 0.1
    # without the mean the same keys move the logits as much
    bare = compared(normal(30, 32), normal(30, 32, seed=1))
    assert found["change"][CENTRED, RANDOM].item() == pytest.approx(
        bare["change"][CENTRED, RANDOM].item(), rel=0.3
    )


def test_empty_slots_are_never_nearest_and_no_cache_is_no_number() -> None:
    past = normal(6, 8)
    live = torch.tensor([False, True, True, True, True, True])
    assert compared(past[:1], past)["identical"].item() == 1
    assert compared(past[:1], past, live=live)["identical"].item() == 0
    assert compared(past[:1], past, live=torch.zeros(6, dtype=torch.bool))["cosine"].isnan().all()


def test_values_are_compared_along_the_matches_of_keys() -> None:
    past, values = normal(6, 8), normal(6, 8, seed=1)
    found = compared(past[:3], past, values=(2 * values[:3], values))
    assert found["value_change"][COSINE, NEAREST].item() == pytest.approx(0.5)


def test_logit_change_is_the_mean_square_of_dot_products() -> None:
    q, moved = normal(2, 3, 7, 4), normal(2, 3, 5, 4, seed=1)
    expected = (moved @ q.mT).square().mean(-1) / 4
    torch.testing.assert_close(logit_change(q, moved), expected)


def test_random_mates_are_live_and_of_the_same_frame() -> None:
    frames = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1]).expand(2, 3, -1)
    live = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool().expand(2, 3, -1)
    mates = same_frame_mates(frames, live, torch.Generator().manual_seed(3))
    mine = torch.arange(8).expand_as(mates)
    assert (frames.gather(-1, mates) == frames)[live].all() and live.gather(-1, mates)[live].all()
    others = live & (frames != 2)
    assert (mates != mine)[others].all() and (mates == mine)[live & (frames == 2)].all()


def test_lags_fall_into_bins_whose_last_is_open() -> None:
    assert lag_bins(torch.tensor([-2, 0, 1, 2, 3, 4, 99]), (0, 1, 2, 4)).tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_more_calls_are_averaged_in_tables_of_the_same_size() -> None:
    drift, now = Drift(2), normal(1, 2, 6, 8)
    size = drift.total.shape
    drift.update(1, now, now)
    drift.update(1, now, -now)
    assert drift.total.shape == size
    assert drift.compute()[0, 1, 0].item() == pytest.approx(0) and drift.compute()[:, 0].isnan().all()


def test_drift_by_region_and_against_other_tokens() -> None:
    now, before = normal(1, 1, 6, 8), normal(1, 1, 6, 8, seed=1)
    before[:, :, :2] = now[:, :, :2]
    drift = Drift(1, num_regions=2)
    drift.update(0, now, before, torch.tensor([0, 0, 1, 1, 1, 1]))
    cosines = torch.nn.functional.cosine_similarity(now[0, 0, :, None], before[0, 0, None], dim=-1)
    found = drift.compute()
    assert found[0, 0, 0].item() == pytest.approx(1)
    assert found[0, 0, 1].item() == pytest.approx(cosines.diagonal()[2:].mean().item(), abs=1e-6)
    others = cosines[~torch.eye(6, dtype=torch.bool)].mean().item()
    assert found[2, 0, 2].item() == pytest.approx(others, abs=1e-6)


def test_drift_less_the_mean_sees_what_a_shared_mean_hides() -> None:
    drift, mean = Drift(1), 50 * torch.ones(16)
    drift.update(0, mean + normal(1, 1, 40, 16), mean + normal(1, 1, 40, 16, seed=1))
    cosine, centred, _ = drift.compute()[:, 0, 0].tolist()
    assert cosine > 0.99 and abs(centred) < 0.2


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(6)).item() == pytest.approx(6)
    assert effective_rank(torch.ones(9, 4)).item() == pytest.approx(1)
    two = torch.cat([torch.eye(5)[:1].expand(8, -1), torch.eye(5)[1:2].expand(8, -1)])
    assert effective_rank(two).item() == pytest.approx(2)


def test_rank_of_a_cache_leaves_out_empty_slots_and_the_mean() -> None:
    x = torch.cat([torch.eye(4), torch.ones(3, 4)])[None, None]
    live = torch.tensor([1, 1, 1, 1, 0, 0, 0]).bool()[None, None]
    plain, centred = EffectiveRank(1, 1), EffectiveRank(1, 1, centred=True)
    for rank in (plain, centred):
        rank.update(0, x, live)
    assert plain.compute().item() == pytest.approx(4)
    assert centred.compute().item() == pytest.approx(3)  # four points span three directions about their mean
