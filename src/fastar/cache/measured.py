"""Files of what was measured once for a checkpoint and lies beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load_measured(
    path: str | Path, build: Callable[[Mapping[str, Any]], T], *, command: str, without: str
) -> T:
    """`build` of what the JSON file says.

    Args:
        path: of the file.
        build: raises a KeyError, TypeError, IndexError or ValueError where something is missing or makes no sense.
        command: the script that measures it.
        without: the setting that does without it, and what then happens.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    if not Path(path).exists():
        raise ValueError(
            f"there is no {path}: measure it with `python experiments/{command} checkpoint={Path(path).parent}`, "
            f"or set {without}"
        )
    try:
        return build(json.loads(Path(path).read_text()))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): measure it again") from error


def rounded(table: Any) -> Any:
    """Nested sequences of numbers as lists, with four digits each."""
    if isinstance(table, int | float):
        return float(f"{table:.4g}")
    return [rounded(part) for part in table]
