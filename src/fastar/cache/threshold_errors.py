"""What a merge threshold costs and saves in every layer, so that thresholds can follow from an error target.

Layers differ in how similar their keys are and in what a merge does to their output: one threshold for all is too
strict for some and too loose for others. The errors are measured once for a checkpoint, by
experiments/calibrate_thresholds.py, with dense keys in every layer (protocol A); beside the measured error stand the
first-order estimate and the bound (`fastar.metrics.redundancy.bound`), and a target may be set for any of the three.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fastar.cache.base import check_choice
from fastar.cache.measured import load_measured, rounded

COMMAND = "calibrate_thresholds.py"
"""Of experiments/, which measures them."""

ErrorKind = Literal["measured", "first_order", "bound"]
"""Of the errors: what was measured, or what is said of it beforehand."""

ErrorRule = Literal["layer", "mean"]
"""What is to keep to the target: every layer, or their mean."""

Curves = tuple[tuple[float, ...], ...]
"""[layers][n], a number for each threshold."""


class Option(NamedTuple):
    """A threshold of a layer with its error and the share of slots that it leaves."""

    threshold: float
    error: float
    slots: float


NO_MERGE = Option(math.inf, 0.0, 1.0)
ROUNDING = 1e-9


@dataclass(frozen=True)
class ThresholdErrors:
    """Measured cost of merging.

    Attributes:
        thresholds: n ascending numbers.
        errors: by `ErrorKind`, [layers][n]: |out - dense| / |dense| of the layer's attention output, mean over heads,
            if its cache merges from that threshold on.
        slots: [layers][n], slots that are left / tokens.
        settings: of the policy that merged, apart from its threshold.
        weights: sha256 of the weights it was measured on.
    """

    thresholds: tuple[float, ...]
    errors: Mapping[str, Curves]
    slots: Curves
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        if not self.thresholds or not rising:
            raise ValueError(f"thresholds must be ascending numbers, got {list(self.thresholds)}")
        if set(self.errors) != set(get_args(ErrorKind)):
            raise ValueError(f"errors must be of the kinds {', '.join(get_args(ErrorKind))}")
        for curves in (*self.errors.values(), self.slots):
            if len(curves) != len(self.slots) or any(len(curve) != len(self.thresholds) for curve in curves):
                raise ValueError(f"every layer needs {len(self.thresholds)} numbers, one for each threshold")
            if not all(0 <= value < math.inf for curve in curves for value in curve):
                raise ValueError("errors and slots must be finite and not negative")

    @property
    def num_layers(self) -> int:
        return len(self.slots)

    @property
    def content(self) -> tuple[Any, ...]:
        """What decides a result."""
        errors, settings = sorted(self.errors.items()), sorted(self.settings.items())
        return (self.thresholds, errors, self.slots, settings)

    def choose(
        self, target: float, *, rule: ErrorRule = "layer", kind: ErrorKind = "measured"
    ) -> list[float]:
        """A threshold for every layer, so that few slots are left; infinite for a layer that had better not merge.

        Args:
            target: the largest error.
            rule: `layer` takes for each layer the fewest slots that keep its error to the target. `mean` takes the
                fewest slots in all whose errors keep to it on average: again and again, the step that saves most slots
                for its error is bought, as long as one can be paid.
            kind: of the errors.
        """
        check_choice("error_rule", rule, get_args(ErrorRule))
        check_choice("error_kind", kind, get_args(ErrorKind))
        offered = [
            [NO_MERGE, *map(Option, self.thresholds, errors, slots)]
            for errors, slots in zip(self.errors[kind], self.slots, strict=True)
        ]
        if rule == "layer":
            allowed = [[option for option in options if option.error <= target] for options in offered]
            return [min(options, key=lambda option: option.slots).threshold for options in allowed]
        return [option.threshold for option in _cheapest(offered, target * self.num_layers)]

    def save(self, path: str | Path, **made: object) -> None:
        """Write as JSON, with what else is to be known about the measurement."""
        tables = {"slots": rounded(self.slots)} | {k: rounded(curves) for k, curves in self.errors.items()}
        rows = {"thresholds": list(self.thresholds), "weights": self.weights, "policy": dict(self.settings)}
        Path(path).write_text(json.dumps({**rows, **made, **tables}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ThresholdErrors:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """

        def build(saved: Mapping[str, Any]) -> ThresholdErrors:
            tables = {
                name: tuple(tuple(curve) for curve in saved[name]) for name in ("slots", *get_args(ErrorKind))
            }
            slots = tables.pop("slots")
            return cls(tuple(saved["thresholds"]), tables, slots, saved["policy"], saved["weights"])

        without = "threshold_errors=null to use one threshold in all layers"
        return load_measured(path, build, command=COMMAND, without=without)


def _cheapest(offered: Sequence[Sequence[Option]], left: float) -> list[Option]:
    """An option of each layer, with few slots in all and errors that sum to at most `left`."""
    chosen = [NO_MERGE for _ in offered]
    while True:
        steps = []
        for layer, options in enumerate(offered):
            now = chosen[layer]
            for option in options:
                price, gain = option.error - now.error, now.slots - option.slots
                if price <= left + ROUNDING and gain > 0:
                    steps.append((gain / max(price, ROUNDING), -layer, option))
        if not steps:
            return chosen
        _, layer, option = max(steps)
        left -= option.error - chosen[-layer].error
        chosen[-layer] = option
