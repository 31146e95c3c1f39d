"""How the passes of a comparison are run: eager or fused, its big linears in which numbers, captured or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

from fastar.backbones.wan.fused import Execution


@dataclass(frozen=True)
class Passes:
    """How passes are run; those of the dense rollout that the others are held against always `PLAIN`.

    Attributes:
        execution: eager, or fused with its linears in the model's dtype or in 8 bits.
        capture: as CUDA graphs, into which no recorder looks: density is not measured then, and protocol A is not run.
    """

    execution: Execution = field(default_factory=Execution)
    capture: bool = False

    @classmethod
    def of(cls, config: DictConfig, device: torch.device, protocols: Sequence[str]) -> Passes:
        """What `execution` and `capture` of conf/compare.yaml ask for.

        Raises:
            ValueError: what cannot be run there.
        """
        passes = cls(Execution(**config.execution), bool(config.capture))
        if passes.capture and device.type != "cuda":
            raise ValueError("passes can be captured on CUDA alone: leave capture=true out")
        if passes.capture and "A" in protocols:
            raise ValueError(
                "protocol A looks at every attention call, which captured passes do not show: leave it out of "
                "protocols=[...], or capture=true"
            )
        return passes

    @property
    def plain(self) -> bool:
        """Whether they are eager and not captured, which identities and labels do not mention."""
        return self == PLAIN

    def identity(self) -> dict[str, Any]:
        """For the identity of a run."""
        if self.plain:
            return {}
        execution = {"fused": self.execution.fused, "linears": str(self.execution.linears)}
        return {"execution": execution, "capture": self.capture}

    def __str__(self) -> str:
        return f"{self.execution}{', captured' if self.capture else ''}"


PLAIN = Passes()
