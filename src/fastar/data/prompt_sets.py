"""Files of prompts: VBench's, MovieGen's and their like, and tables of one's own.

lines         a prompt a line (VBench's all_dimension.txt and prompts_per_dimension/*.txt, MovieGenVideoBench.txt)
json lines    an object a line: prompt, and any of the columns below
csv           a header with the column prompt, and any of:
              text   what the model reads instead of the prompt, which then only names the video (extended prompts)
              id     names it in tables and, where the prompt is too long for a file, on disk; default: the line
              seed   of its first video
              start  the image or video that it begins with, relative to the file
VBench's json VBench_full_info.json: a list of prompt_en and dimension
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "text", "id", "seed", "start")
VIDEOS, IMAGES = (".mp4", ".webm", ".mov"), (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a set; `text` is what the model reads, `seed` None leaves it open."""

    prompt: str
    text: str
    id: str
    seed: int | None = None
    start: Path | None = None
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, in its order, each once; `sha256` is that of the file (and of the extended prompts)."""

    path: Path
    entries: tuple[PromptEntry, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.entries)

    def part(self, first: int = 0, count: int | None = None) -> PromptSet:
        """The entries from number `first` on, `count` of them or all.

        Raises:
            ValueError: there is none left.
        """
        chosen = self.entries[first:] if count is None else self.entries[first : first + count]
        if first < 0 or not chosen:
            raise ValueError(f"{self.path} has {len(self)} prompts: there are none from number {first} on")
        return replace(self, entries=chosen)

    def starting_from(self, file: str | Path) -> PromptSet:
        """The same prompts; those without a start of their own begin with this image or video.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is neither.
        """
        start = Path(file).expanduser()
        if start.suffix.lower() not in (*IMAGES, *VIDEOS):
            raise ValueError(f"{file} is no image or video: {', '.join((*IMAGES, *VIDEOS))} are read")
        if not start.is_file():
            raise FileNotFoundError(f"there is no image {file}")
        digest = hashlib.sha256(self.sha256.encode() + start.read_bytes()).hexdigest()
        entries = tuple(replace(e, start=start if e.start is None else e.start) for e in self.entries)
        return replace(self, entries=entries, sha256=digest)


def read_prompts(path: str | Path, *, extended: str | Path | None = None) -> PromptSet:
    """The prompts of a .txt, .jsonl or .csv file.

    Args:
        path: the file.
        extended: a file with a longer prompt a line for every prompt: what the model reads.

    Raises:
        FileNotFoundError: a file is missing, or one that it names.
        ValueError: it is not as it should be: one sentence names line and column.
    """
    file = _file(path)
    readers = {".txt": _lines, ".jsonl": _json_lines, ".csv": _table}
    if file.suffix not in readers:
        raise ValueError(f"{file} is no file of prompts: {', '.join(readers)} are read")
    return _whole(file, readers[file.suffix](file), extended)


def read_vbench(
    path: str | Path, *, dimensions: Collection[str] | None = None, extended: str | Path | None = None
) -> PromptSet:
    """VBench's prompts: VBench_full_info.json, or one of its .txt files.

    Args:
        path: the file.
        dimensions: keep prompts of these dimensions alone; from the json file, as the others do not name them.
        extended: as in `read_prompts`; for the json file in its order.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; an unknown dimension.
    """
    file = _file(path)
    if file.suffix != ".json":
        if dimensions is not None:
            raise ValueError(
                f"{file} names no dimensions: choose from VBench_full_info.json, or take their own .txt"
            )
        return read_prompts(file, extended=extended)
    found = _whole(file, _full_info(file), extended)
    if dimensions is None:
        return found
    known = {dimension for entry in found.entries for dimension in entry.dimensions}
    if unknown := sorted(set(dimensions) - known):
        raise ValueError(f"{file} has no dimension {unknown[0]!r}: choose from {', '.join(sorted(known))}")
    return replace(
        found, entries=tuple(entry for entry in found.entries if set(entry.dimensions) & set(dimensions))
    )


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    return file


def _whole(file: Path, read: Iterator[PromptEntry], extended: str | Path | None) -> PromptSet:
    entries = list(read)
    digest = hashlib.sha256(file.read_bytes())
    if extended is not None:
        longer = [entry.prompt for entry in _lines(_file(extended))]
        if len(longer) != len(entries):
            raise ValueError(
                f"{extended} has {len(longer)} prompts and {file} {len(entries)}: give a line for each"
            )
        entries = [replace(entry, text=text) for entry, text in zip(entries, longer, strict=True)]
        digest.update(Path(extended).read_bytes())
    once: dict[tuple[Any, ...], PromptEntry] = {}
    for entry in entries:
        once.setdefault((entry.prompt, entry.text, entry.seed, entry.start), entry)
    if not entries:
        raise ValueError(f"{file} holds no prompts")
    if len({entry.id for entry in entries}) < len(entries):
        names = [entry.id for entry in entries]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{file} has the id {twice!r} twice: ids name videos")
    return PromptSet(file, tuple(once.values()), digest.hexdigest())


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line} is not UTF-8: save the file as UTF-8") from error


def _lines(file: Path) -> Iterator[PromptEntry]:
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if prompt := line.strip():
            yield PromptEntry(prompt, prompt, str(number))


def _json_lines(file: Path) -> Iterator[PromptEntry]:
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}, column {error.colno} is no JSON: {error.msg}"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{file}, line {number} is a {type(values).__name__}: write an object with the key prompt"
            )
        yield _entry(file, number, values)


def _table(file: Path) -> Iterator[PromptEntry]:
    reader = csv.reader(io.StringIO(_text_of(file), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "prompt" not in header:
            raise ValueError(
                f"{file}, line 1 names no column prompt: start with a header, of {', '.join(COLUMNS)}"
            )
        if unknown := [name for name in header if name not in COLUMNS]:
            place = header.index(unknown[0]) + 1
            raise ValueError(
                f"{file}, line 1, column {place} is {unknown[0]!r}: known are {', '.join(COLUMNS)}"
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{file}, line {reader.line_num} has {len(row)} columns and the header {len(header)}: quote what "
                    "holds commas"
                )
            yield _entry(file, reader.line_num, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is no CSV: {error}") from error


def _full_info(file: Path) -> Iterator[PromptEntry]:
    try:
        items = json.loads(_text_of(file))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno}, column {error.colno} is no JSON: {error.msg}"
        ) from error
    if not isinstance(items, list):
        raise ValueError(f"{file} is no list of prompts: VBench_full_info.json is one")
    for number, item in enumerate(items, 1):
        prompt = item.get("prompt_en") if isinstance(item, dict) else None
        dimensions = item.get("dimension") if isinstance(item, dict) else None
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(dimensions, list):
            raise ValueError(f"{file}, entry {number} needs prompt_en, a text, and dimension, a list")
        yield PromptEntry(prompt.strip(), prompt.strip(), str(number), dimensions=tuple(map(str, dimensions)))


def _entry(file: Path, line: int, values: Mapping[str, Any]) -> PromptEntry:
    """One prompt of a table; columns that are left empty count as left out."""

    def text(column: str) -> str | None:
        value = values.get(column)
        if (value is not None and not isinstance(value, str | int)) or isinstance(value, bool):
            raise ValueError(f"{file}, line {line}, column {column} must be a text, got {value!r}")
        return str(value).strip() or None if value is not None else None

    prompt, seed, start = text("prompt"), text("seed"), text("start")
    if prompt is None:
        raise ValueError(f"{file}, line {line}, column prompt is empty: write a prompt")
    if seed is not None and not seed.isdecimal():
        raise ValueError(f"{file}, line {line}, column seed must be a whole number from 0 on, got {seed!r}")
    place = None if start is None else file.parent / start
    if place is not None and place.suffix.lower() not in (*IMAGES, *VIDEOS):
        kinds = ", ".join((*IMAGES, *VIDEOS))
        raise ValueError(
            f"{file}, line {line}, column start must be an image or a video ({kinds}), got {start!r}"
        )
    if place is not None and not place.is_file():
        raise FileNotFoundError(f"{file}, line {line}, column start: there is no file {place}")
    return PromptEntry(
        prompt, text("text") or prompt, text("id") or str(line), None if seed is None else int(seed), place
    )
