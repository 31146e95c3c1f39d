"""Backbones on disk: a folder with `model.safetensors` and `config.json` (sizes, training, format, sha256).

The storage formats are those of `fastar.backbones.storage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastar.backbones.base import Backbone, BackboneConfig, build_from_config
from fastar.backbones.storage import (
    CONFIG,
    WEIGHTS,
    StorageFormat,
    check_names,
    read_record,
    read_weights,
    write_weights,
)

__all__ = ["CONFIG", "WEIGHTS", "StorageFormat", "load_backbone", "read_config", "save_backbone"]

MAKER = "experiments/train.py"


def save_backbone(
    path: str | Path,
    backbone: Backbone,
    *,
    storage: StorageFormat = "float32",
    training: Mapping[str, Any] | None = None,
) -> str:
    """Write `backbone` to the folder `path` and return the sha256 of its weights.

    `training` is any JSON-able record of how the weights came about; it is kept in config.json. Files are
    written beside their final names and renamed, weights first. A checkpoint of the same folder is replaced.
    """
    weights = {
        f"{part}.{name}": tensor
        for part, network in backbone.modules().items()
        for name, tensor in network.state_dict().items()
    }
    record = {"backbone": backbone.config.to_dict(), "training": dict(training or {})}
    return write_weights(Path(path), weights, storage=storage, record=record)


def load_backbone(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """The backbone in the folder `path`, in eval mode, its weights as `dtype` on `device`.

    Raises FileNotFoundError if a file is missing and ValueError if one is damaged or does not fit the other.
    """
    folder = Path(path)
    record = read_config(folder)
    tensors = read_weights(folder, checksum=record["sha256"], maker=MAKER)
    backbone = build_from_config(BackboneConfig.from_dict(record["backbone"]), device="meta")
    expected = {
        f"{part}.{name}": tensor.shape
        for part, network in backbone.modules().items()
        for name, tensor in network.state_dict().items()
    }
    check_names(folder / WEIGHTS, "backbone", expected, tensors)
    for part, network in backbone.modules().items():
        state = {name: tensors[f"{part}.{name}"].to(device, dtype) for name in network.state_dict()}
        network.load_state_dict(state, assign=True)
        network.eval()
    backbone.sha256 = record["sha256"]
    return backbone


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of the checkpoint folder `path`: format_version, storage, sha256, backbone, training."""
    return read_record(Path(path), keys={"backbone", "training"}, maker=MAKER)
