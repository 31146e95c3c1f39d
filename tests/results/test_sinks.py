"""Sinks mirror runs, hold none up and never stop one."""

import math
import os
import socket
import subprocess
import sys
import textwrap
import time
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
from fastar.results.files import read_summary
from fastar.results.sinks import CsvSink, NullSink, WandbSink
from fastar.results.sinks.wandb_sink import worker
from tests.results.wandb_offline import read

ROOT = Path(__file__).resolve().parents[2]


def flush() -> None:
    assert worker().flush(60)


def test_wandb_offline_holds_what_was_logged(tmp_path: Path) -> None:
    store = RunStore(tmp_path, "demo", sinks=[WandbSink(tags=("mine",))])
    labels = {"method": "tempcache", "protocol": "C", "backbone": "doom"}
    with store.open({"cache": {"budget_frames": 24}}, seed=3, labels=labels) as run:
        run.log({"prefill_s": 0.25})
        for chunk in range(3):
            run.log(
                {"chunk_s": 0.5 + chunk, "fps_chunk": 4 / (0.5 + chunk)}, chunk=chunk, frame=192 + 4 * chunk
            )
            run.log({"density": 0.5, "cache_bytes": 1000.0}, chunk=chunk, frame=192 + 4 * chunk)
            for clip in range(2):
                scores = {"psnr": 30.0 + chunk + 10 * clip, "revisit": float("nan") if clip else 20.0}
                run.log(scores, chunk=chunk, frame=192 + 4 * chunk, clip=clip)
        run.log({"fps": 12.5, "fps/steady": 13.0})
        for clip in range(2):
            run.log({"vmaf": 90.0 + clip}, clip=clip)
        picture, video = run.folder / "sheet.png", run.folder / "clip.mp4"
        Image.new("RGB", (8, 8), (200, 10, 10)).save(picture)
        video.write_bytes(b"no film, but W&B does not look")
        for sink in run.sinks:
            sink.table("results", pd.DataFrame({"method": ["a"], "psnr": [1.0]}))
            sink.image("sheet", picture)
            sink.video("clip", video)
    flush()
    assert run.summary["warnings"] == []

    found = read(run.folder)
    assert all(math.isnan(line.pop("revisit/clip1")) for line in found.chunks())
    assert found.chunks() == [
        {
            "chunk": chunk,
            "frame": 192 + 4 * chunk,
            "chunk_s": 0.5 + chunk,
            "fps_chunk": 4 / (0.5 + chunk),
            "density": 0.5,
            "cache_bytes": 1000.0,
            "psnr/clip0": 30.0 + chunk,
            "psnr/clip1": 40.0 + chunk,
            "psnr": 35.0 + chunk,
            "revisit/clip0": 20.0,
            "revisit": 20.0,
        }
        for chunk in range(3)
    ]
    whole = {"prefill_s": 0.25, "fps": 12.5, "fps/steady": 13.0, "vmaf": 90.5, "vmaf/clip1": 91.0}
    means = {"psnr/mean": 36.0, "density/mean": 0.5, "chunk_s/mean": 1.5, "revisit/mean": 20.0}
    assert whole.items() | means.items() | {"status": "done"}.items() <= found.summary.items()
    assert found.config["cache"] == {"budget_frames": 24}
    assert {"seed": 3, **labels}.items() <= {
        key: value for key, value in found.config.items() if key != "cache"
    }.items()
    assert (found.run.run_group, found.run.job_type) == ("demo", "tempcache")
    assert set(found.run.tags) == {"mine", "protocol C", "doom"}
    assert found.run.run_id == run.run_id and found.exit_code == 0
    assert {name.split(".")[0] for line in found.history for name in line} >= {"results", "sheet", "clip"}
    media = {path.suffix for path in run.folder.glob("wandb/*/files/media/**/*") if path.is_file()}
    assert media == {".json", ".png", ".mp4"}
    assert str(tmp_path).encode() not in found.raw, "a path of this machine went into the W&B run"


def test_runs_do_not_wait_for_each_other_and_stay_apart(tmp_path: Path) -> None:
    """Two at once, as in protocol A, and a third after them; each has its own sink or shares one."""
    shared = RunStore(tmp_path, "demo", sinks=[WandbSink(group="ablation")])
    other = RunStore(tmp_path, "demo", sinks=[WandbSink()])
    with shared.open({"a": 1}, seed=0) as first, other.open({"a": 2}, seed=0) as second:
        for chunk in range(3):
            first.log({"psnr": 1.0 + chunk}, chunk=chunk, frame=chunk)
            second.log({"psnr": 2.0 + chunk}, chunk=chunk, frame=chunk)
    with shared.open({"a": 3}, seed=0) as third:
        third.log({"psnr": 3.0}, chunk=0, frame=0)
    flush()
    lines = [[line["psnr"] for line in read(run.folder).chunks()] for run in (first, second, third)]
    assert lines == [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0]]
    assert [read(run.folder).run.run_group for run in (first, second)] == ["ablation", "demo"]


def test_a_resumed_run_goes_on_at_its_step(tmp_path: Path) -> None:
    store = RunStore(tmp_path, "demo", sinks=[WandbSink()])
    with pytest.raises(KeyboardInterrupt), store.open({}, seed=0) as run:
        run.log({"psnr": 30.0}, chunk=0, frame=0)
        raise KeyboardInterrupt
    flush()
    first = read(run.folder)
    assert first.summary["status"] == "interrupted" and first.exit_code == 1
    for path in run.folder.glob("wandb/offline-run-*"):
        path.rename(tmp_path / path.name)
    with store.open({}, seed=0) as run:
        for chunk in range(5, 7):
            run.log({"psnr": 30.0 + chunk}, chunk=chunk, frame=4 * chunk)
    flush()
    second = read(run.folder)
    assert second.run.run_id == first.run.run_id
    assert [line["chunk"] for line in second.chunks()] == [5, 6]
    assert b"psnr/mean" not in second.raw, "a mean over a part of the chunks"


def test_a_wandb_error_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    with RunStore(tmp_path, "demo", sinks=[WandbSink()]).open({}, seed=0) as run:
        run.log({"psnr": 30.0}, chunk=0)
        flush()
        run.log({"psnr": 31.0}, chunk=1)
    flush()
    assert load(tmp_path)["value"].tolist() == [30.0, 31.0]
    assert run.summary["warnings"] == ["W&B: CommError: no network"]
    assert sum("goes on without W&B" in line.getMessage() for line in caplog.records) == 1
    assert "CommError: no network" in (run.folder / "wandb/problem.txt").read_text()


def test_a_wandb_error_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: Any, record: dict[str, Any], **_: Any) -> None:
        calls.append(record)
        raise ValueError("not one of wandb's own errors")

    monkeypatch.setattr(wandb.Run, "log", fail)
    sink = WandbSink()
    sink.start(tmp_path, {"run_id": "a"})
    for chunk in range(4):
        sink.scalars({"psnr": 1.0}, chunk=chunk)
        flush()
    sink.finish("done")
    flush()
    assert len(calls) == 1 and sink.problem == "W&B: ValueError: not one of wandb's own errors"


SCRIPT = """
    import logging, sys, time
    from fastar.results import RunStore
    from fastar.results.sinks import WandbSink
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    folder, mode, chunks, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    store = RunStore(folder, "demo", sinks=[WandbSink(mode=mode, init_timeout=1.0, flush_seconds=seconds)])
    slowest = 0.0
    for seed in range(2):
        with store.open({}, seed=seed) as run:
            for chunk in range(chunks):
                start = time.perf_counter()
                run.log({"psnr": 30.0 + chunk}, chunk=chunk, frame=4 * chunk)
                slowest = max(slowest, time.perf_counter() - start)
            start = time.perf_counter()
            for sink in run.sinks:
                sink.finish("done")
            slowest = max(slowest, time.perf_counter() - start)
    print(f"{slowest} {time.time()}")
"""


def process(folder: Path, mode: str, *, chunks: int = 20, seconds: float = 5.0, **environment: str) -> Any:
    """A process that mirrors two runs and ends at once: slowest call, seconds from its last line to its end, stderr."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    settings |= {
        "PYTHONPATH": str(ROOT / "src"),
        "WANDB_API_KEY": "0" * 40,
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    line = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), mode, str(chunks), str(seconds)]
    found = subprocess.run(line, env=settings, capture_output=True, text=True, check=True, timeout=90)
    slowest, last = map(float, found.stdout.split())
    return slowest, time.time() - last, found.stderr


@pytest.fixture(params=["refuses", "is silent"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address where connections are refused; or accepted, by the kernel, and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_unreachable_server_holds_nothing_up(tmp_path: Path, server: str) -> None:
    slowest, ending, said = process(tmp_path, "online", seconds=30.0, WANDB_BASE_URL=server)
    assert slowest < 0.5, "a call of the run waited for W&B"  # imports hold Python's lock for moments
    assert ending < 30, "what cannot be sent is not waited for"
    for folder in (tmp_path / "demo").iterdir():
        found = read(folder)
        assert [line["psnr"] for line in found.chunks()] == [30.0 + chunk for chunk in range(20)]
        assert found.summary["status"] == "done"
        assert f"{server} cannot be reached" in (folder / "wandb/problem.txt").read_text()
        summary = read_summary(folder)
        assert summary is not None and summary["status"] == "done"
        assert f"wandb sync {folder}/wandb/offline-run-*" in said


def test_a_server_that_answers_and_then_stalls_ends_with_one_sentence(tmp_path: Path) -> None:
    program = """
        import http.server, sys, time
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self): self.send_error(404)
            def do_POST(self): time.sleep(60)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        print(server.server_port, flush=True)
        server.serve_forever()
    """
    line = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as stalled:
        try:
            assert stalled.stdout is not None
            address = f"http://127.0.0.1:{int(stalled.stdout.readline())}"
            slowest, ending, said = process(tmp_path, "online", seconds=8.0, WANDB_BASE_URL=address)
        finally:
            stalled.kill()
    assert slowest < 0.5 and ending < 15
    [sentence] = said.splitlines()
    assert sentence.startswith("W&B: 2 run(s) could not be sent within 8 s")
    assert f"wandb sync {tmp_path}/demo/*/wandb/offline-run-*" in sentence
    for folder in (tmp_path / "demo").iterdir():
        assert len(read(folder).chunks()) == 20


def test_what_is_queued_when_the_process_ends_is_written(tmp_path: Path) -> None:
    _, _, said = process(tmp_path, "offline", chunks=500, seconds=40.0)
    for folder in (tmp_path / "demo").iterdir():
        assert [line["frame"] for line in read(folder).chunks()] == [4 * chunk for chunk in range(500)]
    assert "W&B" not in said


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("raise ImportError('no wandb here')", "ImportError: no wandb here"),
        ("import time; time.sleep(60)", "2 run(s) could not be written within 1 s"),
    ],
    ids=["does not import", "hangs"],
)
def test_a_broken_wandb_stops_no_run(tmp_path: Path, source: str, sentence: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/wandb.py").write_text(source)
    path = f"{tmp_path / 'broken'}{os.pathsep}{ROOT / 'src'}"
    slowest, ending, said = process(tmp_path / "runs", "offline", seconds=1.0, PYTHONPATH=path)
    assert slowest < 0.5 and ending < 5 and sentence in said
    rows = load(tmp_path / "runs")
    assert len(rows) == 40 and (rows["status"] == "done").all()


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
    assert type(sink) is kind and getattr(sink, "mode", "offline") == "offline" and sink.problem is None


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logger.mode=onlin is none of offline, online, disabled"):
        WandbSink(mode="onlin")  # type: ignore[arg-type]


def test_sinks_load_neither_wandb_nor_pandas() -> None:
    """Whatever else the package around them loads."""
    program = f"""
        import sys, types
        for name in ("fastar", "fastar.results"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [{str(ROOT / "src")!r} + "/" + name.replace(".", "/")]
        import fastar.results.sinks as sinks
        sinks.WandbSink()
        assert not {{"wandb", "pandas", "torch"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
