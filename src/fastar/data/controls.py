"""Mouse and keyboard of every video frame, as people write them down: files, held keys, chance; for Matrix-Game 2.0."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS: dict[int, tuple[str, ...]] = {
    4: ("forward", "back", "left", "right"),
    2: ("forward", "back"),
    7: ("none", "jump", "slide", "turn_left", "turn_right", "left", "right"),
}
"""Names of the keys, by how many a model of Matrix-Game 2.0 has: universal, gta_drive, templerun."""

MOUSE = ("mouse_up", "mouse_right")
"""The two numbers of the mouse: camera moves of a frame, of which the published model has seen -0.1, 0 and 0.1."""

CAMERA = {
    "camera_up": (0.1, 0.0),
    "camera_down": (-0.1, 0.0),
    "camera_left": (0.0, -0.1),
    "camera_right": (0.0, 0.1),
}
STILL = "none"
HOLD = 12  # video frames that a random action is held, as in the published benchmark


def read_controls(
    text: str, *, keyboard_dim: int, mouse_dim: int, frames: int, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """What is pressed and moved in each of `frames` video frames.

    Args:
        text: a .csv file with a header of key names, mouse_up and mouse_right, a row a frame; a .json list of such
            rows as objects, what they leave out being 0; held keys such as `forward*24,forward+camera_left*12`,
            repeated as often as it takes (`none` presses nothing); or `random`, a key and a camera move at a time, from
            `seed`.
        keyboard_dim, mouse_dim: of the backbone's action module; without a mouse, nothing may move it.

    Returns:
        keyboard float32 [frames, keyboard_dim], 0 and 1, and mouse float32 [frames, mouse_dim], None without one.

    Raises:
        ValueError: an unknown key, a number that is none, a file that is too short, or sizes that no model has.
    """
    if keyboard_dim not in KEYS or mouse_dim not in (0, len(MOUSE)):
        raise ValueError(
            f"controls are known of {', '.join(map(str, KEYS))} keys and a mouse of 0 or {len(MOUSE)} numbers, not of "
            f"{keyboard_dim} and {mouse_dim}: pass windows of actions to the rollout yourself"
        )
    keys, path = KEYS[keyboard_dim], Path(text)
    columns = (*keys, *MOUSE[:mouse_dim])
    if path.suffix in (".csv", ".json"):
        rows = _of_file(path, columns)
        if len(rows) < frames:
            raise ValueError(f"{text} holds {len(rows)} video frames of actions, and {frames} are needed")
    elif text == "random":
        rows = _random(keys, mouse_dim, frames, seed)
    else:
        script = [row for word in text.split(",") for row in _held(word.strip(), keys, mouse_dim)]
        rows = script * -(-frames // len(script))
    table = torch.tensor([[float(row.get(name, 0)) for name in columns] for row in rows[:frames]])
    pressed, moved = table.split([len(keys), mouse_dim], dim=1)
    return pressed, moved if mouse_dim else None


def _of_file(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    if not path.is_file():
        raise ValueError(f"there is no file of actions {path}")
    written = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(written.splitlines()))
    else:
        try:
            rows = json.loads(written)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno} is no JSON: {error.msg}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path} is no list: write an object for every video frame")
    return [_numbers(f"{path}, frame {number}", row, columns) for number, row in enumerate(rows)]


def _numbers(where: str, row: object, columns: Sequence[str]) -> dict[str, float]:
    """One frame of a file."""
    if not isinstance(row, Mapping) or (unknown := [name for name in row if name not in columns]):
        found = f"{unknown[0]!r}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise ValueError(f"{where} has {found}: known are {', '.join(columns)}")
    try:
        return {name: float(value) for name, value in row.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds something that is no number: {error}") from error


def _held(word: str, keys: Sequence[str], mouse_dim: int) -> list[dict[str, float]]:
    """`forward+camera_left*12` -> 12 equal frames."""
    held, _, count = word.partition("*")
    if count and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"'{word}' holds an action for '{count}' frames: write a whole number from 1 on")
    known = [*keys, *(CAMERA if mouse_dim else ()), *(() if STILL in keys else (STILL,))]
    row: dict[str, float] = {}
    for name in held.split("+"):
        if name not in known:
            raise ValueError(
                f"unknown action '{name}': choose from {', '.join(known)}, or name a .csv or .json file"
            )
        moved = CAMERA.get(name)
        if moved is None:
            row[name] = 1
        else:
            row |= {column: row.get(column, 0) + by for column, by in zip(MOUSE, moved, strict=True)}
    return [row] * int(count or 1)


def _random(keys: Sequence[str], mouse_dim: int, frames: int, seed: int) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)

    def one_of(names: Sequence[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    rows: list[dict[str, float]] = []
    while len(rows) < frames:
        word = one_of(keys) + (f"+{one_of([STILL, *CAMERA])}" if mouse_dim else "")
        rows += _held(f"{word}*{HOLD}", keys, mouse_dim)
    return rows
