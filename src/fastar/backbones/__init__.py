"""Causal video transformers, their autoencoder and their checkpoints. Nothing here knows a cache or a
sparsity method.
"""

from fastar.backbones.autoencoder import Autoencoder, AutoencoderConfig
from fastar.backbones.base import Backbone, BackboneConfig, build_backbone
from fastar.backbones.checkpoint import load_backbone, save_backbone
from fastar.backbones.conditions import ImageCondition
from fastar.backbones.prompts import Prompts
from fastar.backbones.wan.config import ActionModuleConfig, WanConfig
from fastar.backbones.wan.transformer import CausalWanTransformer

__all__ = [
    "ActionModuleConfig",
    "Autoencoder",
    "AutoencoderConfig",
    "Backbone",
    "BackboneConfig",
    "CausalWanTransformer",
    "ImageCondition",
    "Prompts",
    "WanConfig",
    "build_backbone",
    "load_backbone",
    "save_backbone",
]
