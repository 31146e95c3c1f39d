"""Random attention inputs and plans, drawn from an explicit generator."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastar.engines import BlockPlan


@dataclass
class Draw:
    """Seeded inputs on one device; draws are made on the CPU, so that every device sees the same."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def log_count(self, batch: int, heads: int, keys: int) -> Tensor:
        """Counts 1..40, a fifth of the slots empty, and one head that is empty altogether."""
        counts = torch.randint(1, 41, (batch, heads, keys), generator=self.generator).float().log()
        counts[torch.rand(counts.shape, generator=self.generator) < 0.2] = -torch.inf
        counts[0, 0] = -torch.inf
        return counts.to(self.device)

    def order(self, batch: int, heads: int, length: int) -> Tensor:
        return torch.argsort(torch.rand(batch, heads, length, generator=self.generator), dim=-1).to(
            self.device
        )

    def plan(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        block_q: int,
        block_k: int,
        *,
        tags: bool = False,
    ) -> BlockPlan:
        """Random orders and blocks; the first query block of one head reads nothing."""
        shape = (batch, heads, -(-queries // block_q), -(-keys // block_k))
        mask = torch.rand(shape, generator=self.generator) < 0.4
        mask[0, -1, 0] = False

        def drawn(length: int) -> Tensor:
            return torch.randint(-1, 4, (batch, heads, length), generator=self.generator).to(self.device)

        return BlockPlan(
            query_order=self.order(batch, heads, queries),
            key_order=self.order(batch, heads, keys),
            block_q=block_q,
            block_k=block_k,
            block_mask=mask.to(self.device),
            query_tags=drawn(queries) if tags else None,
            key_tags=drawn(keys) if tags else None,
        )


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(20260101))
