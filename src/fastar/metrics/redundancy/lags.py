"""How long ago: bins of frame lags, and attention by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.metrics.redundancy.means import MeanTable

LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""First lag of each bin, frames; the last bin is open. Negative lags (later frames of the same chunk) count as 0."""


def lag_bins(lags: Tensor, edges: Sequence[int] = LAGS) -> Tensor:
    """Bin of each lag in frames, int64 of the same shape."""
    bounds = torch.tensor(edges[1:], device=lags.device)
    return torch.bucketize(lags, bounds, right=True)


class AttentionByLag(MeanTable):
    """Share of attention, and of keys, at each lag: [2, layers, bins], attention first.

    Every query, head and call weighs the same. Attention that follows the share of keys does not care for time.

    Args:
        num_layers: of the backbone.
        edges: as `LAGS`.
    """

    def __init__(self, num_layers: int, *, edges: Sequence[int] = LAGS) -> None:
        super().__init__(2, num_layers, len(edges))
        self.edges = tuple(edges)

    def update(
        self, layer: int, weights: Tensor, query_frames: Tensor, key_frames: Tensor, live: Tensor
    ) -> None:
        """Add one call.

        Args:
            layer: index.
            weights: softmax weights [B, H, Q, S].
            query_frames: int64 [Q]. key_frames: int64 [B, H, S].
            live: bool [B, H, S], slots that are not empty.
        """
        bins = lag_bins(query_frames[:, None] - key_frames[..., None, :], self.edges)  # [B, H, Q, S]
        shares = live[..., None, :].double() / live.sum(-1)[..., None, None]
        for kind, values in enumerate((weights.double(), shares.expand(weights.shape))):
            found = values.new_zeros(len(self.edges)).scatter_add(0, bins.flatten(), values.flatten())
            self._add((kind, layer), found, weights[..., 0].numel())
