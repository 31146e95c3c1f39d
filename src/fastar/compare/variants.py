"""Runs of one method with different settings: what an ablation compares, each under a name of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastar.results.files import read_summary

COMMON = ("method", "protocol", "backbone", "budget_share")
"""Labels that are no settings of an ablation; budgets have their own place in reports."""


def settings_of(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """By run id, the labelled settings (`columns` of conf/compare.yaml) in which runs of the same method differ."""
    labels = {s["run_id"]: s["labels"] for run in runs if (s := read_summary(run)) is not None}
    values: dict[tuple[str, str], set[Any]] = {}
    names = {(found["method"], name) for found in labels.values() for name in found}
    for found in labels.values():  # one that lacks a setting others of its method have differs, too
        for method, name in names:
            if method == found["method"]:
                values.setdefault((method, name), set()).add(found.get(name))
    return {
        run: {
            name: value for name, value in found.items()
            if name not in COMMON and len(values[found["method"], name]) > 1
        }
        for run, found in labels.items()
    }  # fmt: skip


def variant_names(runs: Sequence[Path], methods: Sequence[str]) -> dict[str, str]:
    """By run id, `method` or `method setting=value`; in the order of `methods`, then of the settings' values."""
    settings = settings_of(runs)
    own = {s["run_id"]: s["labels"]["method"] for run in runs if (s := read_summary(run)) is not None}
    ranks = {name: rank for rank, name in enumerate(methods)}

    def place(run: str) -> tuple[Any, ...]:
        values = [(isinstance(v, str), v if isinstance(v, str) else float(v)) for v in settings[run].values()]
        return (ranks.get(own[run], len(ranks)), values)

    return {
        run: " ".join([own[run], *(f"{name}={value}" for name, value in settings[run].items())])
        for run in sorted(own, key=place)
    }
