"""Attention calls with known structure, and a bucketizer whose buckets can be read off the vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext, PassKind
from fastar.sparsity import SelectRequest

CURRENT, CACHED, HEADS, DIM = 24, 150, 2, 16


class FirstCoordinate(Bucketizer):
    """The bucket of a vector is its first coordinate, rounded down to whole numbers from 0."""

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return queries[..., 0].clamp(min=0).long(), keys[..., 0].clamp(min=0).long()


def denoise(step: int, num_steps: int, first_frame: int = 8) -> PassContext:
    return PassContext(PassKind.DENOISE, first_frame, 4, (500.0,) * 4, step=step, num_steps=num_steps)


@pytest.fixture
def request_for() -> Callable[..., SelectRequest]:
    """Makes a call whose tokens lie in 6 clusters, cluster number in the first coordinate."""

    def make(
        *,
        seed: int = 0,
        empty: float = 0.0,
        current: int = CURRENT,
        cached: int = CACHED,
        context: PassContext | None = None,
        layer: int = 0,
    ) -> SelectRequest:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(6, DIM, generator=generator) * 4

        def tokens(length: int) -> Tensor:
            cluster = torch.randint(0, 6, (1, HEADS, length), generator=generator)
            x = centres[cluster] + 0.3 * torch.randn(1, HEADS, length, DIM, generator=generator)
            x[..., 0] = cluster + 0.5
            return x

        log_count = None
        if empty:
            log_count = torch.randint(1, 9, (1, HEADS, cached + current), generator=generator).float().log()
            gone = torch.rand(1, HEADS, cached, generator=generator) < empty
            log_count[..., :cached].masked_fill_(gone, -torch.inf)
        return SelectRequest(
            layer=layer,
            context=context or denoise(3, 4),
            q=tokens(current),
            k=tokens(cached + current),
            num_current=current,
            log_count=log_count,
        )

    return make
