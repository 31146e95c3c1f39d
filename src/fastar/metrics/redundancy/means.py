"""Means filed under an index: what all streaming measures of redundancy are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class MeanTable(Metric):
    """Sums and counts in a table of fixed size, so that memory does not grow with the number of calls.

    A subclass adds to them in its `update`.

    Args:
        shape: of the table.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """float32 [*shape], NaN where nothing was added."""
        return self.means()

    def means(self) -> Tensor:
        """As `compute`, without a warning if nothing was added at all."""
        return (self.total / self.count).float()

    def _add(self, index: Any, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to the part of the table at `index` (as of a tensor) the sum `total` of `count` numbers."""
        place = self.total.device
        self.total[index] += torch.as_tensor(total, device=place)
        self.count[index] += torch.as_tensor(count, device=place)


class Means(MeanTable):
    """A table that others add to."""

    def update(self, index: Any, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to the part of the table at `index` (as of a tensor) the sum `total` of `count` numbers."""
        self._add(index, total, count)


class Tables(Metric):
    """Several `Means` under names; a subclass adds to them in its `update`."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, tables: Mapping[str, Means]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(tables)

    def compute(self) -> dict[str, Tensor]:
        """Every table by its name."""
        return {name: table.means() for name, table in self.tables.items()}  # type: ignore[operator]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for table in self.tables.values():
            table.reset()  # type: ignore[operator]

    def _add(self, name: str, index: Any, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        self.tables[name].update(index, total, count)  # type: ignore[operator]


def unit(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """x [..., D], less `mean`, at length 1 (a zero vector stays zero)."""
    return torch.nn.functional.normalize(x if mean is None else x - mean, dim=-1)


def masked_mean(x: Tensor, live: Tensor) -> Tensor:
    """Mean [..., 1, D] of those x [..., S, D] where bool `live` [..., S]."""
    weight = live.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)
