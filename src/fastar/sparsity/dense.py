"""Dense attention: every pair, in every pass."""

from __future__ import annotations

from torch import Tensor

from fastar.attention.context import PassContext
from fastar.engines.plan import BlockPlan
from fastar.sparsity.base import (
    PADDINGS,
    CrossSelector,
    Padding,
    PromptKeys,
    Selector,
    SelectRequest,
    check_choice,
)


class Dense(Selector):
    """Dense self-attention, the baseline every selector is measured against."""

    def __init__(self) -> None:
        super().__init__(layers=())

    def select(self, request: SelectRequest) -> BlockPlan | None:
        """No plan: all pairs."""
        return None


class DenseCross(CrossSelector):
    """Dense cross-attention: every prompt token is read.

    Args:
        padding: see `CrossSelector`; `merged` is dense cross-attention with less work.
    """

    def __init__(self, *, padding: Padding = "attended") -> None:
        super().__init__(layers=())
        check_choice("padding", padding, PADDINGS)
        self.padding = padding

    def select(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor | None:
        """No selection: all tokens."""
        return None
