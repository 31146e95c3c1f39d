"""Which query-key pairs are computed: one file a selector."""

from fastar.sparsity.annca import AnnCA
from fastar.sparsity.annsa import AnnSA
from fastar.sparsity.base import CrossSelector, Selector, SelectRequest, calibrate_layers
from fastar.sparsity.dense import Dense, DenseCross
from fastar.sparsity.merge import compact, merge_identical
from fastar.sparsity.random_blocks import RandomBlocks

__all__ = [
    "AnnCA",
    "AnnSA",
    "CrossSelector",
    "Dense",
    "DenseCross",
    "RandomBlocks",
    "SelectRequest",
    "Selector",
    "calibrate_layers",
    "compact",
    "merge_identical",
]
