"""Splits of a last wave of query tiles over the keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastar.engines.waves import MOST_SPLITS, boundaries, join, split_of

from .conftest import Draw

H100, TILE, WIDTH = 132, 128, 128


def test_a_chunk_of_wan_runs_three_waves_whole() -> None:
    """37 tiles of each of 12 heads: 33 of them are three waves, which leave 456 queries."""
    assert 3 * H100 == 33 * 12
    for keys in (9_216, 13_864, 32_760, 131_040):
        chosen = split_of(4_680, keys, 12, H100, TILE, WIDTH)
        assert chosen is not None and chosen[0] == 33 * TILE and 2 <= chosen[1] <= MOST_SPLITS


def test_what_fills_its_waves_or_has_few_keys_is_left_alone() -> None:
    assert split_of(33 * TILE, 131_040, 12, H100, TILE, WIDTH) is None
    assert split_of(4_680, 512, 12, H100, TILE, WIDTH) is None
    assert split_of(60 * TILE, 131_040, 11, H100, TILE, WIDTH) is None, "five waves"


def test_parts_of_lists_fit_into_one_wave() -> None:
    """Of four tiles of 12 heads, two parts do; over few blocks they are not worth their kernels."""
    for keys in (64 * 128, 90 * 128, 256 * 128):
        assert split_of(4_680, keys, 12, H100, TILE, WIDTH, listed=True) == (33 * TILE, 2)
        assert (split_of(4_680, keys, 12, H100, TILE, WIDTH) or (0, 0))[1] > 2
    assert split_of(4_680, 32 * 128, 12, H100, TILE, WIDTH, listed=True) is None
    assert split_of(40 * TILE, 32_768, 12, H100, TILE, WIDTH) is not None
    assert split_of(40 * TILE, 32_768, 12, H100, TILE, WIDTH, listed=True) is None, (
        "7 tiles of 12 heads, twice"
    )


def test_a_few_queries_are_split_altogether() -> None:
    whole, splits = split_of(192, 9_216, 2, H100, TILE, WIDTH) or (None, 0)
    assert whole == 0 and splits == MOST_SPLITS


@pytest.mark.parametrize("heads", [1, 3, 12, 40])
@pytest.mark.parametrize("queries", [1, 128, 500, 4_680, 14_040])
def test_splits_leave_queries_for_their_parts(queries: int, heads: int) -> None:
    for keys in (1, 100, 5_000, 100_000):
        chosen = split_of(queries, keys, heads, H100, TILE, WIDTH)
        if chosen is not None:
            assert 0 <= chosen[0] < queries and chosen[0] % TILE == 0 and 2 <= chosen[1] <= MOST_SPLITS < keys


def test_narrow_heads_are_split_over_fewer_keys_later() -> None:
    """A kernel more costs them more keys' worth of time."""
    fewest = [
        next(keys for keys in range(0, 9_216, 64) if split_of(192, keys, 6, H100, 192, width))
        for width in (128, 64)
    ]
    assert fewest[0] < fewest[1]


def test_parts_of_the_keys_are_equal_but_for_one() -> None:
    ends = boundaries(133, 5, torch.device("cpu"))
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == 133
    assert set(ends.diff().tolist()) == {26, 27}
    assert boundaries(133, 5, torch.device("cpu")) is ends, "captured calls read it where it was"


@pytest.mark.parametrize("width", [24, 128])
def test_parts_are_joined_by_their_sums(draw: Draw, width: int, device: torch.device) -> None:
    """In place within larger outputs; a part without keys says nothing, and a query without any gets zeros."""
    draw = dataclasses.replace(draw, device=device)
    splits, n, heads = 5, 37, 3
    parts, sums = draw.normal(splits, n, heads, width), 9 * draw.normal(splits, heads, n)
    sums[2, 1], sums[:, 0, 4] = -torch.inf, -torch.inf
    out, lse = torch.full((50, heads, width), 7.0, device=device), torch.full((heads, 50), 7.0, device=device)
    join(parts, sums, out[13:].transpose(0, 1), lse[:, 13:])
    weights = sums.softmax(0).nan_to_num(0.0)
    torch.testing.assert_close(out[13:], torch.einsum("shn,snhd->nhd", weights, parts))
    torch.testing.assert_close(lse[:, 13:], sums.logsumexp(0))
    assert (out[:13] == 7).all() and (lse[:, :13] == 7).all() and (out[17, 0] == 0).all()
