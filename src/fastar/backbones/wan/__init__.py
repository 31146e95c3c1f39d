"""The causal Wan family: one transformer, its configs and its checkpoint names."""

from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.transformer import CausalWanTransformer

__all__ = ["CausalWanTransformer", "WanConfig"]
