"""Random weights that mean nothing: for dry runs, and for the speed of backbones whose weights are not at hand."""

import hashlib
import json
from collections.abc import Iterable

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from fastar.backbones import Backbone
from fastar.results.provenance import device_name

LARGE = 100_000_000
"""Parameters from which weights are drawn on the device itself: one core takes half a minute for a billion."""


def random_backbone(config: DictConfig, device: torch.device, seed: int = 0) -> Backbone:
    """A backbone of `config` with random weights everywhere, also where training starts from zero.

    What attention does then shows in the pictures, which mean nothing. Small backbones are drawn on the CPU, the same
    everywhere, and `sha256` is that of their bytes. Large ones are drawn on `device`, whose generator knows neither
    other devices' numbers nor, from one GPU model to the next, its own: `sha256` is that of config, seed and device.
    """
    shapes: Backbone = instantiate(config, device="meta")
    large = sum(p.numel() for network in shapes.modules().values() for p in network.parameters()) >= LARGE
    place = device if large else torch.device("cpu")
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        backbone: Backbone = instantiate(config, device=str(place))
        for network in backbone.modules().values():
            for parameter in network.eval().parameters():
                _fill_zeros(parameter)
                parameter.requires_grad_(False)
    if large:
        place_name = device_name(device) if device.type == "cuda" else device.type
        backbone.sha256 = _digest([json.dumps([shapes.config.to_dict(), seed, place_name]).encode()])
    else:
        networks = backbone.modules().values()
        backbone.sha256 = _digest(p.numpy().tobytes() for network in networks for p in network.parameters())
    return backbone


@torch.no_grad()
def _fill_zeros(parameter: nn.Parameter) -> None:
    if parameter.ndim > 1 and not parameter.any():
        parameter.normal_(std=0.05)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
