"""How much the latent queries of a frame want each prompt token: exactly, or by approximate nearest neighbours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from fastar.ann.base import Matcher, seeded_planes
from fastar.ann.codes import codes_of
from fastar.ann.lsh import check_bits
from fastar.ann.quantized import quantize
from fastar.engines.reference import attention_weights
from fastar.sparsity.base import PromptKeys, check_choice


class TokenScorer(ABC):
    """Scores prompt tokens for one call of cross-attention."""

    @abstractmethod
    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        """float32 [B, H, S] for queries q [B, H, Lq, D]: higher is wanted more. Scores of padding mean nothing."""


class ExactMass(TokenScorer):
    """Attention that a token gets, summed over the queries: the definition the others are measured against."""

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        return attention_weights(q, prompt.k, log_count=prompt.log_count).sum(2)


class QuantizedMass(TokenScorer):
    """The same from symmetric codes of `bits` bits of queries and keys, one scale a head.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, *, bits: int = 4) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be from 2 to 8, got {bits}")
        self.bits = bits

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        # the mean key adds the same to all logits of a query, and would waste levels
        keys = prompt.k.float() - mean_of_real(prompt)
        coded = [quantize(x.float().flatten(0, 1), self.bits).unflatten(0, x.shape[:2]) for x in (q, keys)]
        return attention_weights(coded[0], coded[1], log_count=prompt.log_count).sum(2)


class LSHCounts(TokenScorer):
    """Queries that share a token's bucket, summed over several hash tables: co-occupancy as a number.

    Or, with `counted=tables`, the number of tables in which any query does: AnnCA's rule as a score.

    Buckets are sign patterns of random hyperplanes. Keys are taken about their mean and queries are not: q.k ranks
    keys as q.(k - mean) does, while the queries' own mean is what all of them ask for, such as a shot's sentence.

    Args:
        bits: of a table's code, 1 to 16.
        tables: hash tables.
        counted: `queries` or `tables`.
        seed: of the hyperplanes.
    """

    def __init__(
        self,
        *,
        bits: int = 4,
        tables: int = 16,
        counted: Literal["queries", "tables"] = "queries",
        seed: int = 0,
    ) -> None:
        check_bits(bits, 16)
        check_choice("counted", counted, ("queries", "tables"))
        if tables < 1:
            raise ValueError(f"tables must be at least 1, got {tables}")
        self.bits, self.tables, self.counted, self.seed = bits, tables, counted, seed

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        keys = prompt.k - mean_of_real(prompt).to(prompt.k.dtype)
        planes = seeded_planes(self.seed, q.shape[-1], self.tables * self.bits, like=q)
        query_codes, key_codes = (self._codes(x, planes) for x in (q, keys))
        size = 2**self.bits
        # whole numbers: the order of a racing scatter cannot matter
        filled = torch.zeros(*query_codes.shape[:-1], size, device=q.device, dtype=torch.int32)
        filled.scatter_add_(-1, query_codes, torch.ones_like(query_codes, dtype=torch.int32))
        shared = filled.gather(-1, key_codes)
        return (shared if self.counted == "queries" else shared.clamp(max=1)).sum(2).float()

    def _codes(self, x: Tensor, planes: Tensor) -> Tensor:
        """[B, H, L, D] -> int64 [B, H, tables, L]."""
        return codes_of((x @ planes).unflatten(-1, (self.tables, self.bits))).transpose(2, 3)


class NearestVotes(TokenScorer):
    """Queries whose nearest real token (largest q.k) a token is.

    Args:
        matcher: finds it: exact, lsh, quantized or faiss.
    """

    def __init__(self, *, matcher: Matcher) -> None:
        self.matcher = matcher

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        # in float32: logits of bfloat16 tie. Matchers may take keys about their mean, which padding would drag along
        keys = torch.where(prompt.real[..., None], prompt.k.float(), mean_of_real(prompt))
        nearest, _ = self.matcher.nearest(
            q.float().flatten(0, 1), keys.flatten(0, 1), valid=prompt.real.flatten(0, 1), metric="dot"
        )
        found = nearest.unflatten(0, q.shape[:2])
        votes = torch.zeros(prompt.real.shape, device=q.device, dtype=torch.int32)
        votes.scatter_add_(-1, found.clamp(min=0), (found >= 0).int())
        return votes.float()


class RandomScores(TokenScorer):
    """The control: an order of the tokens that knows nothing, the same in every call and for every prompt.

    Args:
        seed: of the order.
        longest: tokens of the longest prompt; the order of fewer depends on it.
    """

    def __init__(self, *, seed: int = 0, longest: int = 512) -> None:
        self.seed, self.longest = seed, longest

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        if prompt.tokens is None and prompt.k.shape[2] > self.longest:
            raise ValueError(
                f"the prompt has {prompt.k.shape[2]} tokens and random scores are for {self.longest}: raise `longest`"
            )
        order = seeded_planes(self.seed, self.longest, 1, like=prompt.k[..., :0].float())[:, 0]
        if prompt.tokens is None:
            return order[: prompt.k.shape[2]].expand(prompt.real.shape)
        return order[prompt.tokens]


def mean_of_real(prompt: PromptKeys) -> Tensor:
    """Mean key of the tokens that are no padding, float32 [B, H, 1, D]."""
    real = prompt.real[..., None]
    return (prompt.k.float() * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
