"""Optimisers and the learning-rate schedule of a run that is limited by time or by steps.

Matrices inside the blocks go to Muon (its update scaled to AdamW's RMS; its learning rate is a multiple of AdamW's),
everything else to AdamW. The schedule is a trapezoid over the *share of the run that is done*, so that a run limited by
wall-clock time ends with the learning rate at zero, wherever it runs.
"""

import time
from collections.abc import Iterable

import torch
from torch import nn


def build_optimizers(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    kind: str = "muon",
    matrix_scale: float = 1.0,
) -> list[torch.optim.Optimizer]:
    """Optimisers for the trainable parameters of `module`: Muon for block matrices and AdamW for the rest, or AdamW.

    Muon's learning rate is `matrix_scale` times that of AdamW.

    Raises:
        ValueError: unknown `kind`, or a `matrix_scale` that is not positive.
    """
    if matrix_scale <= 0:
        raise ValueError(f"matrix_scale must be positive, got {matrix_scale}")
    if kind not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer '{kind}': choose muon or adamw")
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if kind == "muon" and "blocks." in name and p.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decayed = [p for p in rest if p.ndim >= 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                [{"params": matrices, "scale": matrix_scale}],
                lr=learning_rate * matrix_scale,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    """Set AdamW's learning rate, and Muon's to its multiple of it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value * group.get("scale", 1.0)


class Progress:
    """Share of a run that is done: by steps, or by wall-clock minutes when those are given.

    Args:
        max_steps: length in optimiser steps.
        max_minutes: length in minutes; None counts steps alone. Whichever is reached first ends the run.
        warmup_steps: linear warm-up.
        decay_share: last share of the run over which the learning rate falls linearly to zero.
    """

    def __init__(
        self, *, max_steps: int, max_minutes: float | None, warmup_steps: int, decay_share: float
    ) -> None:
        if max_steps < 1 or (max_minutes is not None and max_minutes <= 0) or not 0 < decay_share <= 1:
            raise ValueError(
                "a training stage needs max_steps >= 1, max_minutes > 0 (or null) and decay_share in (0, 1], "
                f"got {max_steps}, {max_minutes} and {decay_share}"
            )
        self.max_steps, self.max_minutes = max_steps, max_minutes
        self.warmup_steps, self.decay_share = warmup_steps, decay_share
        self.elapsed_before = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock (first batch of a fit), keeping the time of an interrupted run before it."""
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, earlier parts of a resumed run included."""
        return self.elapsed_before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def done(self, step: int) -> float:
        """Share of the run that is done, 0 to 1."""
        share = step / self.max_steps
        if self.max_minutes is not None:
            share = max(share, self.elapsed / (60 * self.max_minutes))
        return min(share, 1.0)

    def scale(self, step: int, done: float) -> float:
        """Factor on the base learning rate."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return warm * min(1.0, (1.0 - done) / self.decay_share)
