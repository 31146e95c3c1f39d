"""Metrics with qualifiers, `key_cosine/space=raw/layer=3`: tables of numbers as rows of the store, and back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

Label = str | int | float
DIGITS = 4
"""Significant digits of a number in a table: there are many of them, and they carry their own spread."""


def qualified(metric: str, **qualifiers: Label) -> str:
    """`metric/name=value/...`, in the order given."""
    return "/".join([metric, *(f"{name}={value}" for name, value in qualifiers.items())])


def table_rows(metric: str, table: Tensor, **axes: Sequence[Label]) -> dict[str, float]:
    """A table of numbers as values by qualified name; numbers that are not there (NaN) are left out.

    Args:
        metric: name.
        table: one dimension for each of `axes`.
        axes: labels along each dimension, by its name.
    """
    assert list(table.shape) == [len(labels) for labels in axes.values()], (metric, table.shape, axes)
    return {
        qualified(metric, **dict(zip(axes, labels, strict=True))): float(f"{value:.{DIGITS}g}")
        for labels, value in _entries(table.tolist(), list(axes.values()))
        if not math.isnan(value)
    }


def unfold(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of one metric with its qualifiers as columns, numbers as numbers; `metric` is the bare name then.

    Raises:
        ValueError: there are none.
    """
    chosen = rows[[name.partition("/")[0] == metric for name in rows["metric"]]]
    if chosen.empty:
        raise ValueError(f"no row of {metric} is there: run experiments/redundancy.py, or name other runs")
    parts = [_qualifiers(name) for name in chosen["metric"]]
    return chosen.assign(metric=metric).reset_index(drop=True).join(pd.DataFrame(parts))


def _entries(values: Any, axes: Sequence[Sequence[Label]]) -> Iterator[tuple[list[Label], float]]:
    if not axes:
        yield [], values
        return
    for label, part in zip(axes[0], values, strict=True):
        for labels, value in _entries(part, axes[1:]):
            yield [label, *labels], value


def _qualifiers(name: str) -> Mapping[str, Label]:
    pairs = (part.partition("=") for part in name.split("/")[1:])
    return {key: _number(value) for key, _, value in pairs}


def _number(text: str) -> Label:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
