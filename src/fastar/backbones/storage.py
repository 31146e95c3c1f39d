"""Weights on disk: a folder with `model.safetensors` (tensors) and `config.json` (format, sha256, what the owner adds).

Storage formats:
- float32: as trained.
- bfloat16: every tensor rounded.
- int8: matrices, embeddings and convolutions as int8 with one float32 scale per output row or channel (symmetric,
  w = scale * q); small tensors (norms, biases, modulation, latent statistics) in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

StorageFormat = Literal["float32", "bfloat16", "int8"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT_VERSION = 1
SCALE_SUFFIX = ".int8_scale"
SMALLEST_INT8 = 4096  # numbers; smaller tensors stay in float32: the saving would not show


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], *, storage: StorageFormat, record: Mapping[str, Any]
) -> str:
    """Write `weights` to `folder` in a storage format, `record` (JSON-able) into config.json; returns the sha256.

    Files are written beside their final names and renamed, weights first. Weights that are there are replaced.

    Raises:
        ValueError: there is no such storage format.
    """
    if storage not in get_args(StorageFormat):
        raise ValueError(f"storage must be one of {', '.join(get_args(StorageFormat))}, got {storage!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensors |= _pack(name, tensor.detach().cpu(), storage)
    unfinished = folder / (WEIGHTS + ".part")
    save_file(tensors, unfinished)
    checksum = sha256_of(unfinished)
    opening = {"format_version": FORMAT_VERSION, "storage": storage, "sha256": checksum}
    unfinished_config = folder / (CONFIG + ".part")
    unfinished_config.write_text(json.dumps(opening | dict(record), indent=2) + "\n")
    # safetensors lets nobody but the owner read what it writes
    shutil.copymode(unfinished_config, unfinished)
    unfinished.replace(folder / WEIGHTS)
    unfinished_config.replace(folder / CONFIG)
    return checksum


def read_record(folder: Path, *, keys: Collection[str], maker: str) -> dict[str, Any]:
    """config.json of `folder`, with format_version, storage, sha256 and at least `keys`.

    Args:
        folder: where `write_weights` wrote.
        keys: what the owner needs of the record.
        maker: the command that makes such folders; errors name it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"No checkpoint in {folder}: {CONFIG} is missing; give a folder written by {maker}."
        )
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore the checkpoint.") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} is not of checkpoint format {FORMAT_VERSION}; write it again with {maker}.")
    absent = sorted({"storage", "sha256", *keys} - set(record))
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; restore the checkpoint.")
    return record


def read_weights(folder: Path, *, checksum: str, maker: str) -> dict[str, Tensor]:
    """Float32 tensors, on the CPU, of the weights in `folder`.

    Args:
        folder: where `write_weights` wrote.
        checksum: sha256 of the file, from its record.
        maker: the command that makes such folders; errors name it.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, or not those of the record.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; restore the checkpoint or make it with {maker}.")
    if sha256_of(weights) != checksum:
        raise ValueError(
            f"{weights} is damaged or incomplete ({weights.stat().st_size} bytes, its sha256 is not that in "
            f"{CONFIG}); restore the checkpoint or make it again with {maker}."
        )
    try:
        return _unpack(load_file(weights))
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is not a readable safetensors file ({error}); restore the checkpoint."
        ) from error


def check_names(
    weights: Path, owner: str, expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless `tensors`, read from the file `weights`, have the names and shapes that `owner` needs."""
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    reshaped = sorted(name for name in set(expected) & set(tensors) if expected[name] != tensors[name].shape)
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{weights} does not hold the {owner} of its {CONFIG}: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(reshaped)} of another shape "
            f"{reshaped[:3]}; use weights and config of one checkpoint."
        )


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the file `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(name: str, tensor: Tensor, storage: StorageFormat) -> dict[str, Tensor]:
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


def _unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of what `_pack` wrote."""
    restored = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = stored.get(name + SCALE_SUFFIX)
        values = tensor.float()
        restored[name] = values if scale is None else values * scale.view(-1, *[1] * (tensor.dim() - 1))
    return restored
