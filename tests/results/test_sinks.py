"""Sinks mirror runs and never stop one."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image

from fastar.results import RunStore, load
from fastar.results.sinks import CsvSink, NullSink, WandbSink

BLOCK = 32768


def records(path: Path) -> Iterator[bytes]:
    """Records of a W&B offline file: LevelDB's log framing, each piece with its checksum."""
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
        position += length
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        record += piece
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def parsed(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], bytes]:
    """History, summary and config of the one offline run below `folder`, and the raw file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}

    def items(entries: Any) -> dict[str, Any]:
        return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}

    for raw in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
        elif kind == "run":
            config |= items(record.run.config.update)
        elif kind == "config":
            config |= items(record.config.update)
    return history, summary, config, path.read_bytes()


def test_wandb_offline_holds_what_was_logged(tmp_path: Path) -> None:
    store = RunStore(tmp_path, "demo", sinks=[WandbSink()])
    with store.open({"cache": {"budget_frames": 24}}, seed=3, labels={"method": "tempcache"}) as run:
        for chunk in range(3):
            run.log({"psnr": 30.0 + chunk}, chunk=chunk, frame=4 * chunk)
        run.log({"fps": 12.5})
        picture = run.folder / "sheet.png"
        Image.new("RGB", (8, 8), (200, 10, 10)).save(picture)
        for sink in run.sinks:
            sink.table("results", pd.DataFrame({"method": ["a"], "psnr": [1.0]}))
            sink.image("sheet", picture)
    assert run.summary["warnings"] == []

    history, summary, config, raw = parsed(run.folder)
    assert [(line["frame"], line["psnr"]) for line in history if "psnr" in line] == [
        (0, 30.0),
        (4, 31.0),
        (8, 32.0),
    ]
    assert summary["fps"] == 12.5 and summary["status"] == "done"
    assert (
        config["seed"] == 3 and config["method"] == "tempcache" and config["cache"] == {"budget_frames": 24}
    )
    assert {name.split(".")[0] for line in history for name in line} >= {"results", "sheet"}
    assert str(tmp_path).encode() not in raw, "a path of this machine went into the W&B run"


def test_a_wandb_error_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    with RunStore(tmp_path, "demo", sinks=[WandbSink(mode="online")]).open({}, seed=0) as run:
        run.log({"psnr": 30.0}, chunk=0)
        run.log({"psnr": 31.0}, chunk=1)
    assert load(tmp_path)["value"].tolist() == [30.0, 31.0]
    assert run.summary["warnings"] == ["W&B: CommError: no network"]
    assert sum("goes on without W&B" in line.getMessage() for line in caplog.records) == 1


def test_a_wandb_error_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = WandbSink(mode="disabled")
    sink.start(tmp_path, {"run_id": "a"})
    calls = []

    def fail(record: dict[str, Any]) -> None:
        calls.append(record)
        raise wandb.errors.UsageError("lost")

    monkeypatch.setattr(sink._run, "log", fail)
    sink.scalars({"psnr": 1.0}, chunk=0)
    sink.scalars({"psnr": 2.0}, chunk=1)
    sink.finish("done")
    assert len(calls) == 1 and sink.problem == "W&B: UsageError: lost"


def test_csv_sink_goes_on_in_its_file(tmp_path: Path) -> None:
    for chunk in range(2):
        sink = CsvSink()
        sink.start(tmp_path, {})
        sink.scalars({"psnr": 30.0 + chunk}, chunk=chunk, frame=4 * chunk)
        sink.table("results", pd.DataFrame({"a": [1]}))
        sink.finish("done")
    rows = pd.read_csv(tmp_path / "scalars.csv")
    assert rows["chunk"].tolist() == [0, 1] and rows["value"].tolist() == [30.0, 31.0]
    assert (tmp_path / "results.csv").read_text() == "a\n1\n"


@pytest.mark.parametrize(("name", "kind"), [("none", NullSink), ("csv", CsvSink), ("wandb", WandbSink)])
def test_configs_make_sinks(repository: Path, name: str, kind: type) -> None:
    sink = hydra.utils.instantiate(OmegaConf.load(repository / f"conf/logger/{name}.yaml"))
    assert type(sink) is kind and getattr(sink, "mode", "offline") == "offline"
