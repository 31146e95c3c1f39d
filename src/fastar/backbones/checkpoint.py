"""Backbones on disk: a folder with `model.safetensors` (tensors) and `config.json` (sizes, format, sha256).

Storage formats:
- float32: as trained.
- bfloat16: every tensor rounded.
- int8: matrices and convolutions as int8 with one float32 scale per output row or channel (symmetric,
  w = scale * q); small tensors (norms, biases, modulation, latent statistics) in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastar.backbones.base import Backbone, BackboneConfig, build_from_config

StorageFormat = Literal["float32", "bfloat16", "int8"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT_VERSION = 1
SCALE_SUFFIX = ".int8_scale"
SMALLEST_INT8 = 4096  # numbers; smaller tensors stay in float32: the saving would not show


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
    if storage not in get_args(StorageFormat):
        raise ValueError(f"storage must be one of {', '.join(get_args(StorageFormat))}, got {storage!r}.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for part, network in backbone.modules().items():
        for name, tensor in network.state_dict().items():
            tensors |= _store(f"{part}.{name}", tensor.detach().cpu(), storage)
    unfinished = folder / (WEIGHTS + ".part")
    save_file(tensors, unfinished)
    sha256 = _sha256(unfinished)
    record = {
        "format_version": FORMAT_VERSION,
        "storage": storage,
        "sha256": sha256,
        "backbone": backbone.config.to_dict(),
        "training": dict(training or {}),
    }
    unfinished_config = folder / (CONFIG + ".part")
    unfinished_config.write_text(json.dumps(record, indent=2) + "\n")
    # safetensors lets nobody but the owner read what it writes
    shutil.copymode(unfinished_config, unfinished)
    unfinished.replace(folder / WEIGHTS)
    unfinished_config.replace(folder / CONFIG)
    return sha256


def load_backbone(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """The backbone in the folder `path`, in eval mode, its weights as `dtype` on `device`.

    Raises FileNotFoundError if a file is missing and ValueError if one is damaged or does not fit the other.
    """
    folder = Path(path)
    record = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} is missing; restore the checkpoint or train it with experiments/train.py."
        )
    sha256 = _sha256(weights)
    if sha256 != record["sha256"]:
        raise ValueError(
            f"{weights} is damaged or incomplete ({weights.stat().st_size} bytes, its sha256 is not that in "
            f"{CONFIG}); restore the checkpoint or train it again."
        )
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is not a readable safetensors file ({error}); restore the checkpoint."
        ) from error
    backbone = build_from_config(BackboneConfig.from_dict(record["backbone"]), device="meta")
    tensors = _restore(stored)
    _check_names(weights, backbone, tensors)
    for part, network in backbone.modules().items():
        state = {name: tensors[f"{part}.{name}"].to(device, dtype) for name in network.state_dict()}
        network.load_state_dict(state, assign=True)
        network.eval()
    backbone.sha256 = sha256
    return backbone


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of the checkpoint folder `path`: format_version, storage, sha256, backbone, training."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"No checkpoint in {path}: {CONFIG} is missing; give a folder written by save_backbone."
        )
    try:
        record = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore the checkpoint.") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} is not of checkpoint format {FORMAT_VERSION}; write it again with save_backbone."
        )
    absent = sorted({"storage", "sha256", "backbone", "training"} - set(record))
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; restore the checkpoint.")
    return record


def _store(name: str, tensor: Tensor, storage: StorageFormat) -> dict[str, Tensor]:
    """The tensors that stand for `name` in the file."""
    if storage == "float32":
        return {name: tensor.float().contiguous()}
    if storage == "bfloat16":
        return {name: tensor.to(torch.bfloat16).contiguous()}
    if not name.endswith(".weight") or tensor.dim() < 2 or tensor.numel() < SMALLEST_INT8:
        return {name: tensor.float().contiguous()}
    rows = tensor.float().flatten(1)
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    quantised = (rows / scale).round().to(torch.int8)
    return {
        name: quantised.view(tensor.shape).contiguous(),
        name + SCALE_SUFFIX: scale.squeeze(1).contiguous(),
    }


def _restore(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of what `_store` wrote."""
    restored = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = stored.get(name + SCALE_SUFFIX)
        values = tensor.float()
        restored[name] = values if scale is None else values * scale.view(-1, *[1] * (tensor.dim() - 1))
    return restored


def _check_names(weights: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    expected = {
        f"{part}.{name}": tensor.shape
        for part, network in backbone.modules().items()
        for name, tensor in network.state_dict().items()
    }
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    reshaped = sorted(name for name in set(expected) & set(tensors) if expected[name] != tensors[name].shape)
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{weights} does not hold the backbone of its {CONFIG}: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(reshaped)} of another shape "
            f"{reshaped[:3]}; use weights and config of one checkpoint."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
