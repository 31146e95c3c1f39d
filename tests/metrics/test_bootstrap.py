"""Intervals that cover what they say."""

import math

import numpy as np
import pytest

from fastar.metrics.bootstrap import excludes_zero, interval, paired_difference


def test_coverage_is_near_its_level() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sample = generator.exponential(size=30)  # skewed, true mean 1
        found = interval(sample, resamples=500)
        hits += found.low <= 1 <= found.high
    assert 0.87 < hits / 300 < 0.98


def test_width_is_that_of_the_standard_error() -> None:
    sample = np.random.default_rng(1).normal(size=400)
    found = interval(sample)
    error = sample.std() / math.sqrt(400)
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    assert found.mean == pytest.approx(sample.mean()) and found.n == 400


def test_same_numbers_every_time() -> None:
    sample = np.random.default_rng(2).normal(size=20)
    assert interval(sample) == interval(sample)
    assert interval(sample, seed=1) != interval(sample)


def test_pairing_removes_what_seeds_share() -> None:
    generator = np.random.default_rng(3)
    seeds = generator.normal(scale=10, size=25)
    better, worse = seeds + 1 + generator.normal(scale=0.5, size=25), seeds
    found = paired_difference(better, worse)
    assert excludes_zero(found) and found.mean == pytest.approx(1, abs=0.3)
    assert not excludes_zero(paired_difference(generator.permutation(better), worse))


def test_few_and_odd_values() -> None:
    single = interval([3.0])
    assert single.mean == 3 and math.isnan(single.low) and single.n == 1
    infinite = interval([math.inf, 30.0, 31.0])
    assert infinite.mean == math.inf and infinite.low <= 31 and infinite.high == math.inf
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        interval([1.0, math.nan])
    with pytest.raises(ValueError, match="as many on both sides"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="level must lie"):
        interval([1.0, 2.0], level=95)
