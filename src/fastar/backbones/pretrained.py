"""Published weights into networks: read as they are needed, checked, and known by their sha256.

Nothing is read twice into memory: files are mapped, and a tensor is read when it is copied to its place in the network.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastar.backbones.base import Backbone
from fastar.backbones.checkpoint import load_backbone
from fastar.backbones.resolve import SAFE, Weights, find_weights
from fastar.backbones.storage import sha256_of
from fastar.backbones.wan.keys import load_weights, to_wan_names, unwrap_container
from fastar.backbones.wan.lora import merge_lora

TRANSFORMER = "transformer"
LORA = ("lora.pt", "lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def load_checkpoint(
    checkpoint: str | Path,
    shapes: Callable[[], Backbone],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = True,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    store: str | Path = "checkpoints",
    cache: str | Path | None = None,
) -> Backbone:
    """A backbone, in eval mode, from one of our folders or from published weights of its transformer.

    Args:
        checkpoint: path or hub id (`fastar.backbones.resolve`).
        shapes: makes the backbone of the config on the device `meta`; not asked for with one of our folders, which says
            itself what it holds.
        device, dtype: of the transformer.
        use_ema: prefer averaged weights where a training checkpoint holds both. `sha256` of the backbone is that of the
            file or files; of weights that were taken with use_ema=False, a hash of it and that.
        lora: path or hub id of a LoRA file, which is merged into the weights before they become `dtype`; None: none.
        lora_alpha: of a file that does not hold its own; None: its rank (`fastar.backbones.wan.lora`).
        store: folder where checkpoints are put.
        cache: folder where checksums of large files are remembered; None: nowhere.

    Raises:
        FileNotFoundError, ValueError: no such weights, damaged ones, or ones that do not fit: one sentence says what.
    """
    found = find_weights(checkpoint, part=TRANSFORMER, store=store)
    update = None if lora is None else find_weights(lora, part="lora", usual=LORA, store=store)
    if found.ours:
        backbone = load_backbone(found.folder)
        if update is not None:
            load_weights(
                backbone.transformer,
                _merged(backbone.transformer.state_dict(), backbone, update, lora_alpha, found),
            )
        backbone.transformer.to(device, dtype)
    else:
        backbone = shapes()
        state = unwrap_container(read_tensors(found.files), use_ema=use_ema)
        if update is not None:
            state = _merged(state, backbone, update, lora_alpha, found)
        backbone.transformer.to(dtype).to_empty(device=device)
        try:
            load_weights(backbone.transformer, state)
        except ValueError as error:
            raise ValueError(f"{found.files[0]}: {error}") from error
        backbone.transformer.eval()
        backbone.sha256 = checksum(found.files, cache)
        if not use_ema:
            backbone.sha256 = hashlib.sha256(f"{backbone.sha256} use_ema=False".encode()).hexdigest()
    if update is not None:
        backbone.lora_sha256 = checksum(update.files, cache)
        both = f"{backbone.sha256} lora={backbone.lora_sha256} alpha={lora_alpha}"
        backbone.sha256 = hashlib.sha256(both.encode()).hexdigest()
    return backbone


def _merged(
    state: Mapping[str, Tensor], backbone: Backbone, lora: Weights, alpha: float | None, found: Weights
) -> Mapping[str, Tensor]:
    """`state` with the LoRA merged in; a ValueError names the file that does not fit."""
    config = backbone.config.transformer
    try:
        state = to_wan_names(state, config)
    except ValueError as error:
        raise ValueError(f"{found.files[0]}: {error}") from error
    try:
        return merge_lora(state, read_tensors(lora.files), config, alpha=alpha)
    except ValueError as error:
        raise ValueError(f"{lora.files[0]}: {error}") from error


def read_tensors(files: Sequence[Path]) -> dict[str, Any]:
    """What the files of a checkpoint hold: tensors by name, of a training checkpoint dicts of them; on the CPU, mapped.

    Raises:
        ValueError: a file is truncated, of another kind, or holds more than tensors.
    """
    found: dict[str, Any] = {}
    for file in files:
        if file.suffix in SAFE:
            try:
                with safe_open(file, framework="pt") as opened:
                    found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(_damaged(file)) from error
        else:
            found |= _unpickled(file)
    return found


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            held = torch.load(
                file, map_location="cpu", weights_only=True
            )  # torch before 1.6 wrote no zip files
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # which a map of less than was announced gives
            raise
        if "Unsupported global" in str(error):
            raise ValueError(
                f"{file} holds more than tensors, and loading that could run foreign code: convert it to safetensors "
                "where it comes from"
            ) from error
        raise ValueError(_damaged(file)) from error
    if not isinstance(held, dict):
        raise ValueError(
            f"{file} holds a {type(held).__name__} instead of tensors by name: give another file"
        )
    return held


def _damaged(file: Path) -> str:
    return f"{file} ({file.stat().st_size} bytes) is truncated or no file of weights: download it again"


def checksum(files: Sequence[Path], cache: str | Path | None = None) -> str:
    """sha256 of a file; of several, that of their names and checksums, in order. See `remembered_sha256`."""
    sums = [remembered_sha256(file, cache) for file in files]
    if len(sums) == 1:
        return sums[0]
    named = [[file.name, found] for file, found in zip(files, sums, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def remembered_sha256(file: Path, cache: str | Path | None) -> str:
    """sha256 of `file`, computed once: below `cache` it is kept beside the file's size and time of change.

    Reading a checkpoint of 57 GB again in every run of a sweep would take minutes. A file that changes while neither of
    them does is not noticed; remove the folder then.
    """
    stat, place = file.stat(), str(file.resolve())
    known = {"file": place, "size": stat.st_size, "changed_ns": stat.st_mtime_ns}
    if cache is None:
        return sha256_of(file)
    note = Path(cache) / "sha256" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        if {key: noted[key] for key in known} == known:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not noted yet, or a note that cannot be read: it is written again
    found = sha256_of(file)
    write_whole(note, (json.dumps(known | {"sha256": found}) + "\n").encode())
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes may write, too: the last one wins, and nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
