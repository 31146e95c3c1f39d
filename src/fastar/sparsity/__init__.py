"""Which query-key pairs are computed: one file a selector."""

from fastar.sparsity.annca import AnnCA
from fastar.sparsity.annsa import AnnSA
from fastar.sparsity.base import CrossSelector, PromptKeys, Selector, SelectRequest, calibrate_layers
from fastar.sparsity.dense import Dense, DenseCross
from fastar.sparsity.merge import compact, merge_identical
from fastar.sparsity.prompt_scores import ExactMass, LSHCounts, NearestVotes, QuantizedMass, RandomScores
from fastar.sparsity.random_blocks import RandomBlocks
from fastar.sparsity.ranked_ca import RankedCA
from fastar.sparsity.token_tags import TokenTags

__all__ = [
    "AnnCA",
    "AnnSA",
    "CrossSelector",
    "Dense",
    "DenseCross",
    "ExactMass",
    "LSHCounts",
    "NearestVotes",
    "PromptKeys",
    "QuantizedMass",
    "RandomBlocks",
    "RandomScores",
    "RankedCA",
    "SelectRequest",
    "Selector",
    "TokenTags",
    "calibrate_layers",
    "compact",
    "merge_identical",
]
