"""Reads a W&B offline run back, with no server: LevelDB's log framing around protobuf records."""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768


@dataclass
class Offline:
    """What was logged: lines of the history without W&B's own keys, summary, config, the run's record; the raw file."""

    raw: bytes
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    exit_code: int | None = None

    def chunks(self) -> list[dict[str, Any]]:
        """Lines of chunks."""
        return [line for line in self.history if "chunk" in line]


def records(path: Path) -> Iterator[bytes]:
    """Records of the file, each piece with its checksum; a piece that is cut off ends it."""
    content, position, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        if kind == 0 and length == 0:
            position += left - 7
            continue
        piece = content[position : position + length]
        if len(piece) < length:
            return
        position += length
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        record += piece
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def read(folder: Path, *, seconds: float = 20.0) -> Offline:
    """The one offline run below `folder`, once it is closed: wandb's service writes its end some moments later."""
    (path,) = folder.rglob("run-*.wandb")
    deadline = time.monotonic() + seconds
    while (found := parse(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found.exit_code is not None, f"{path} is not closed"
    return found


def parse(path: Path) -> Offline:
    """What the file holds so far."""
    from wandb.proto import wandb_internal_pb2

    found = Offline(path.read_bytes())

    def items(entries: Any) -> dict[str, Any]:
        return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}

    for raw in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            line = items(record.history.item)
            found.history.append({name: value for name, value in line.items() if not name.startswith("_")})
        elif kind == "summary":
            found.summary |= items(record.summary.update)
        elif kind == "run":
            found.run = record.run
            found.config |= items(record.run.config.update)
        elif kind == "config":
            found.config |= items(record.config.update)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found
