"""Random blocks: the control that any content-based selector has to beat at equal density."""

from __future__ import annotations

from typing import Unpack

import torch

from fastar.engines.plan import BlockPlan
from fastar.sparsity.base import ScheduleOptions, Selector, SelectRequest
from fastar.sparsity.blocks import (
    DensityOf,
    build_plan,
    check_block_sizes,
    check_density,
    choose_blocks,
    lay_out_keys,
)


class RandomBlocks(Selector):
    """Executes the current chunk and uniformly drawn blocks of the cache, in original token order.

    Args:
        density, density_of: executed / dense pairs to aim for, of all or of those with the past, as in `AnnSA`.
        seed: the draw depends on it and on layer, chunk and step alone, not on the device.
        block_q, block_k: tokens per block.
        layers, warmup_share, min_dense_steps, commit_dense: see `Scheduled`.
    """

    draws = True

    def __init__(
        self,
        *,
        density: float = 0.25,
        density_of: DensityOf = "all",
        seed: int = 0,
        block_q: int = 16,
        block_k: int = 32,
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(**schedule)
        check_density(density, density_of)
        check_block_sizes(block_q, block_k)
        self.density, self.density_of, self.seed = density, density_of, seed
        self.block_q, self.block_k = block_q, block_k
        self.blocks = None if density == 1 else (block_q, block_k)

    def select(self, request: SelectRequest) -> BlockPlan | None:
        """A plan with randomly drawn blocks; None if the density is 1."""
        if self.density == 1:
            return None
        (batch, heads, num_queries, _), num_keys, device = (
            request.q.shape,
            request.k.shape[2],
            request.q.device,
        )
        one_bucket = torch.zeros(batch, heads, num_keys, dtype=torch.long, device=device)
        layout = lay_out_keys(one_bucket, request.log_count, request.num_current)
        generator = torch.Generator().manual_seed(self._draw_seed(request))
        shape = (batch, heads, -(-num_queries // self.block_q), -(-num_keys // self.block_k))
        scores = torch.rand(shape, generator=generator).to(device, non_blocking=True)
        chosen = choose_blocks(scores, layout, self.block_k, self.density, self.density_of)
        order = torch.arange(num_queries, device=device).expand(batch, heads, num_queries)
        return build_plan(
            order, layout, chosen.mask, self.block_q, self.block_k, max_blocks=chosen.most, lists=chosen.lists
        )

    def _draw_seed(self, request: SelectRequest) -> int:
        seed = self.seed
        for part in (request.layer, request.context.first_frame, request.context.step):
            seed = (seed * 1_000_003 + part + 1) % 2**63
        return seed
