"""How attention to a prompt is spread over its tokens, with the padding apart."""

from __future__ import annotations

from torch import Tensor

from fastar.metrics.redundancy.means import Means, Tables
from fastar.metrics.redundancy.top_entries import entropy
from fastar.sparsity.base import PromptKeys


class PromptMass(Tables):
    """Attention of latent queries to prompt tokens, by layer: each table is [layers].

    padding_mass: attention to padding. padding_share: padding / all tokens.
    entropy: in nats, of attention to the prompt's own tokens, taken alone.
    effective: mean of exp(entropy), the effective number of tokens; effective_share: the same / the prompt's tokens.
    effective_padded: of attention to all tokens, padding included.

    Args:
        num_layers: of the backbone.
    """

    def __init__(self, num_layers: int) -> None:
        names = (
            "padding_mass",
            "padding_share",
            "entropy",
            "effective",
            "effective_share",
            "effective_padded",
        )
        super().__init__({name: Means(num_layers) for name in names})

    def update(self, layer: int, weights: Tensor, prompt: PromptKeys) -> None:
        """Add one call: softmax weights [B, H, Q, S] over the keys of `prompt`, merged padding with its count."""
        real = prompt.real[:, :, None]
        own = (weights * real).sum(-1)
        found = entropy(weights * real / own[..., None].clamp(min=1e-9))
        tokens = prompt.real.sum(-1)[..., None].float()
        counts = _counts(prompt)
        measured = {
            "padding_mass": 1 - own,
            "padding_share": (1 - tokens / counts.sum(-1, keepdim=True)).expand_as(own),
            "entropy": found,
            "effective": found.exp(),
            "effective_share": found.exp() / tokens,
            "effective_padded": entropy(weights, prompt.log_count).exp(),
        }
        for name, values in measured.items():
            self._add(name, layer, values.sum(), values.numel())


def _counts(prompt: PromptKeys) -> Tensor:
    """Tokens that each key stands for, [B, H, S]."""
    if prompt.log_count is None:
        return prompt.real.new_ones(prompt.real.shape).float()
    return prompt.log_count.exp()
