"""How much vectors change from one chunk, step or layer to the next."""

from __future__ import annotations

from torch import Tensor

from fastar.metrics.redundancy.means import MeanTable, unit

DRIFTS = ("cosine", "centred", "random")
"""Cosine of a token's two vectors; the same less the mean of each side; cosine to the vectors of all other tokens."""


class Drift(MeanTable):
    """Cosines between two lists of vectors that belong together, one by one: [3, layers, regions], of `DRIFTS`.

    Args:
        num_layers: of the backbone.
        num_regions: kinds of tokens that are told apart; the last column of the result is of all tokens.
    """

    def __init__(self, num_layers: int, *, num_regions: int = 0) -> None:
        super().__init__(len(DRIFTS), num_layers, num_regions + 1)
        self.num_regions = num_regions

    def update(self, layer: int, now: Tensor, before: Tensor, regions: Tensor | None = None) -> None:
        """Add one call.

        Args:
            layer: index.
            now, before: [B, H, N, D].
            regions: int64 [N], the kind of each token of `now`.
        """
        now, before = now.float(), before.float()
        tokens = now.shape[2]
        centred = [unit(x, x.mean(2, keepdim=True)) for x in (now, before)]
        now, before = unit(now), unit(before)
        # all pairs of different tokens at once: the sum of all dot products less that of the pairs themselves
        own = (now * before).sum(-1)
        others = ((now * before.sum(2, keepdim=True)).sum(-1) - own) / max(tokens - 1, 1)
        for kind, cosines in enumerate((own, (centred[0] * centred[1]).sum(-1), others)):
            for region in range(self.num_regions):
                if regions is not None:
                    chosen = cosines[..., regions == region]
                    self._add((kind, layer, region), chosen.sum(), chosen.numel())
            self._add((kind, layer, self.num_regions), cosines.sum(), cosines.numel())
