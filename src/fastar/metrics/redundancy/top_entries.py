"""How much of attention its largest entries hold: recall against density (the paper's figure 2).

Entries are taken for each query, which no kernel can do but which bounds what any selector can keep, or for blocks of
queries and keys, which is what block-sparse kernels run. Both choose by the true weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.metrics.recall import relative_output_error
from fastar.metrics.redundancy.means import Means, Tables

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
ENTRIES = ("query", "blocks")


class TopEntries(Tables):
    """Recall and output error at given densities, [entries, layers, heads, densities], of `ENTRIES`.

    Recall is the mass of the entries that are kept, which equals 1 - total variation once they are renormalised. The
    error is relative, of the output that the renormalised entries give, norm over the queries of a call.

    Args:
        num_layers, num_heads: of the backbone.
        densities: pairs kept / all pairs of a call.
        block_q, block_k: tokens in a block. Keys are in the cache's order; the last block may be shorter.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        *,
        densities: Sequence[float] = DENSITIES,
        block_q: int = 16,
        block_k: int = 32,
    ) -> None:
        shape = (len(ENTRIES), num_layers, num_heads, len(densities))
        super().__init__({"recall": Means(*shape), "error": Means(*shape)})
        self.densities, self.block_q, self.block_k = tuple(densities), block_q, block_k

    def update(self, layer: int, weights: Tensor, values: Tensor, live: Tensor) -> None:
        """Add one call.

        Args:
            layer: index.
            weights: softmax weights [B, H, Q, S] of whole blocks of queries; a call with fewer queries is one block.
            values: [B, H, S, D].
            live: bool [B, H, S], slots that are not empty; densities are of these.

        Raises:
            ValueError: queries that are no whole number of blocks.
        """
        batch, queries = weights.shape[0], weights.shape[2]
        block_q = min(self.block_q, queries)
        if queries % block_q:
            raise ValueError(
                f"{queries} queries are no whole number of blocks of {block_q}: pass whole blocks"
            )
        values, slots = values.float(), live.sum(-1)
        dense = weights @ values
        blocks = self._blocks(weights, block_q)
        ranks = [_ranks(x) for x in (weights, blocks)]
        for number, density in enumerate(self.densities):
            for entries, rank in enumerate(ranks):
                units = slots if entries == 0 else (slots / self.block_k).ceil().long()
                # rounded down, or the density would be more than it says; at least one
                count = (density * units).floor().long().clamp(min=1)
                kept = rank < count[..., None, None]
                if entries == 1:
                    kept = self._spread(kept, block_q, weights.shape[-1])
                left = weights * kept
                mass = left.sum(-1)
                at = (entries, layer, slice(None), number)
                self._add("recall", at, mass.sum((0, 2)), batch * queries)
                error = relative_output_error(left @ values / mass[..., None], dense)
                self._add("error", at, error.sum(0), batch)

    def _blocks(self, weights: Tensor, block_q: int) -> Tensor:
        """Mass of each block: [B, H, Q / block_q, blocks of keys]."""
        padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % self.block_k))
        return padded.unflatten(-1, (-1, self.block_k)).sum(-1).unflatten(2, (-1, block_q)).sum(3)

    def _spread(self, kept: Tensor, block_q: int, keys: int) -> Tensor:
        """Blocks that are kept -> their pairs."""
        return kept.repeat_interleave(block_q, 2).repeat_interleave(self.block_k, 3)[..., :keys]


def _ranks(x: Tensor) -> Tensor:
    """Place of each number [..., n] from the largest, 0, on; of equal ones the first comes first."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place)


def entropy(weights: Tensor, log_count: Tensor | None = None) -> Tensor:
    """Entropy (nats) of softmax weights [..., S]; a merged slot's weight is shared by its members: [...].

    Its exponential is the effective number of tokens: n for uniform attention over n.
    """
    terms = torch.special.entr(weights)
    if log_count is not None:
        terms = terms + weights * torch.where(log_count == -math.inf, 0, log_count)[..., None, :]
    return terms.sum(-1)
