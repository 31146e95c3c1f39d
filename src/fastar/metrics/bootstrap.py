"""Percentile bootstrap intervals of a mean, over seeds or clips (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval; of a single value there is none, low and high are then NaN."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of independent `values` [N] with its percentile interval.

    Args:
        values: one number per independent unit. Average chunks and clips of one seed first: they are not independent.
        level: coverage aimed at. With fewer than about 10 values the interval is too narrow.
        resamples: bootstrap samples.
        seed: of the resampling, so that a table is the same every time.

    Raises:
        ValueError: no values, NaN among them, or a level outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    if sample.size == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    if np.isnan(sample).any():
        raise ValueError(
            f"{int(np.isnan(sample).sum())} of {sample.size} values are NaN: leave them out and say so"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    tail = 100 * (1 - level) / 2
    # inverted_cdf takes a value that occurs, so that infinities (a PSNR without a cap) do not turn into NaN
    low, high = np.percentile(_means(sample, resamples, seed), [tail, 100 - tail], method="inverted_cdf")
    return Interval(mean, float(low), float(high), sample.size)


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values - baseline` [N] with its interval; entry i of both is the same seed (or clip).

    Raises:
        ValueError: the two are not of the same length, or as in `interval`.
    """
    left, right = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (values, baseline))
    if left.shape != right.shape:
        raise ValueError(f"paired values must be as many on both sides, got {left.size} and {right.size}")
    return interval(left - right, level=level, resamples=resamples, seed=seed)


def excludes_zero(difference: Interval) -> bool:
    """Whether an interval lies wholly on one side of zero."""
    return bool(difference.low > 0 or difference.high < 0)


def _means(sample: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    pieces: Sequence[int] = [
        min(1000, resamples - start) for start in range(0, resamples, 1000)
    ]  # bounds the memory
    draws = (
        sample[generator.integers(sample.size, size=(piece, sample.size))].mean(axis=1) for piece in pieces
    )
    return np.concatenate(list(draws))
