"""Files of a run, written so that a crash leaves the old or the new content, never half of it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEAST_ROOM = 2**20
"""Bytes: with less left on the disk, whatever fails is put down to that."""

SUMMARY, ROWS, TABLE, STATE = "summary.json", "metrics.jsonl", "metrics.parquet", "state.pt"
PROMPT = "prompt.json"  # which phrases of its first clip's prompt a run read (fastar/compare/words.py)


class Unwritable(ValueError):
    """Nothing can be written to a folder: the disk is full, say. What is there already stays as it is."""


def unwritable(folder: Path, error: OSError, setting: str = "paths.outputs") -> Unwritable:
    """What to raise if nothing can be written to `folder`, which `setting` names."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unwritable(f"cannot write to {folder} ({reason}): make room, then the same command goes on")
    return Unwritable(f"cannot write to {folder} ({reason}): choose another place with {setting}=...")


def no_room(folder: Path, error: BaseException) -> bool:
    """Whether an error came of a full disk. Writers below Python (of tensors, of video) do not say so by its type."""
    told = any(text in str(error) for text in ("No space left", "quota exceeded"))
    return told or shutil.disk_usage(folder).free < LEAST_ROOM


@contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to; what was written there becomes `path` on success and is removed on failure.

    `shared`: other processes may write the same file at this moment; the last one wins.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run folder, or None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SUMMARY
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove the folder to run it again") from error
    if not isinstance(record, dict) or not {"run_id", "status"} <= record.keys():
        raise ValueError(f"{path} is not the summary of a run: remove the folder to run it again")
    return record


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that was cut off in mid-write is left out.

    Raises:
        ValueError: a line other than the last is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):  # no newline at its end: the process died while writing it
                break
            raise ValueError(
                f"{path}, line {number} is damaged ({error}): remove the folder to run it again"
            ) from error
    return rows
