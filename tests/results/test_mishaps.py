"""Kills, full disks, clocks that jump, lost nodes, signals that hit a child: what the store makes of each."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hydra.utils import instantiate

from fastar.interruption import Interrupted, listening
from fastar.results import RunStore, load
from fastar.results import files as files_module
from fastar.results.files import ROWS, STATE, Unwritable, read_summary
from fastar.results.lock import RunLock, RunLocked, is_stale, start_of, this_process
from fastar.results.logtail import reason_of
from fastar.results.run import Run


def opened(root: Path, seed: int = 0, **options: Any) -> Run:
    return RunStore(root, "demo", **options).open({"frames": 8}, seed=seed, labels={"method": "window"})


def test_who_holds_a_lock_does_not_depend_on_any_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    holder = lock.holder()
    assert holder is not None
    monkeypatch.setattr(
        psutil, "boot_time", lambda: 0.0
    )  # what psutil derives from the clock after it was set
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1e9)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not is_stale(holder) and start_of(os.getpid()) == holder["process_start"]
    with pytest.raises(RunLocked):
        RunLock(tmp_path).acquire()
    lock.release()
    assert not lock.path.exists()


def test_a_lock_that_was_taken_over_is_not_removed_by_its_old_holder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.path.write_text(json.dumps({**this_process(), "pid": 1, "host": "another"}))
    lock.release()
    assert lock.path.exists() and not lock.held


def test_what_a_kill_leaves_behind_is_swept_away(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        run.log({"psnr": 30.0}, chunk=0)
        run.save_state({"chunk": 1})
        raise KeyboardInterrupt
    for name in ("lock.0123.part", "state.pt.part", "metrics.jsonl.part", "summary.json.part"):
        (run.folder / name).write_text("half")
    with opened(tmp_path) as again:
        assert again.resumed and len(again.rows()) == 1
        assert not list(run.folder.glob("*.part"))
    (run.folder / STATE).write_text("a process was killed right after the summary said done")
    (run.folder / ROWS).write_text("")
    assert opened(tmp_path).finished
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "log.txt",
        "metrics.parquet",
        "summary.json",
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("unexpected pos 449216 vs 449168"),
        ValueError("ffmpeg failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whoever notices it: Python says so by type, writers of tensors and videos do not."""
    usage = shutil.disk_usage(tmp_path)
    with (
        pytest.raises(Unwritable, match=r"cannot write to .*\(No space left on device\): make room, then"),
        opened(tmp_path) as run,
    ):
        run.log({"psnr": 30.0}, chunk=0)
        run.save_state({"chunk": 1})
        full = SimpleNamespace(total=usage.total, used=usage.total, free=4096)
        monkeypatch.setattr(files_module.shutil, "disk_usage", lambda folder: full)
        monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(error))
        run.save_state({"chunk": 2})
    summary = read_summary(run.folder)
    assert summary is not None and summary["status"] == "running" and not (run.folder / "lock").exists()
    monkeypatch.undo()
    with opened(tmp_path) as again:
        assert again.load_state() == {"chunk": 1} and len(again.rows()) == 1


def test_an_error_with_room_on_the_disk_is_that_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"), opened(tmp_path) as run:
        raise RuntimeError("unexpected pos 1 vs 2")
    assert read_summary(run.folder)["status"] == "failed"  # type: ignore[index]


def test_an_error_after_a_signal_is_an_interruption(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ffmpeg, say, has got the signal, too."""
    with listening(), pytest.raises(Interrupted), opened(tmp_path) as run:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise RuntimeError("ffmpeg was killed")
    assert read_summary(run.folder)["status"] == "running"  # type: ignore[index]
    assert not (run.folder / "lock").exists() and "SIGUSR1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answer", "stale"),
    [
        ("echo RUNNING", False), ("echo COMPLETING", False), ("echo PENDING", True), ("echo NODE_FAIL", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)  # fmt: skip
def test_a_job_on_another_host_is_gone_when_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, stale: bool
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert is_stale({**this_process(), "host": "another", "job": "12_3"}) is stale
    assert "--jobs 12_3" in (tmp_path / "asked").read_text()


def test_what_hydra_wraps_is_told_as_it_is() -> None:
    with pytest.raises(Exception, match="Error in call to target") as caught:
        instantiate({"_target_": "fastar.ann.QuantizedMatcher", "bits": 16})
    assert reason_of(caught.value) == "bits must be from 2 to 8, got 16"


def test_a_thousand_runs_load_in_less_than_five_seconds(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        for chunk in range(12):
            run.log({f"metric{number}": 1.0 for number in range(20)}, chunk=chunk, frame=4 * chunk)
    summary = json.loads((run.folder / "summary.json").read_text())
    for number in range(1, 1000):
        copy = run.folder.with_name(f"{number:012x}")
        copy.mkdir()
        shutil.copy(run.folder / "metrics.parquet", copy)
        (copy / "summary.json").write_text(json.dumps({**summary, "run_id": copy.name, "seed": number}))
    load(run.folder)  # imports
    begun = time.process_time()  # not the wall: other tests run beside this one
    rows = load(tmp_path / "**")
    assert time.process_time() - begun < 5.0
    assert len(rows) == 1000 * 240 and rows["run_id"].nunique() == 1000
