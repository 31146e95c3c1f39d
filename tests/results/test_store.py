"""Runs are found, skipped, resumed and locked; nothing half-written is ever read as complete."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastar.results import RunStore, load, load_runs
from fastar.results import lock as lock_module
from fastar.results.failures import is_out_of_memory
from fastar.results.files import ROWS, STATE, TABLE, atomic
from fastar.results.lock import RunLock, RunLocked, is_stale, this_process
from fastar.results.run import Run

CONFIG = {"cache": {"budget_frames": 24}}


def opened(root: Path, **options: Any) -> Run:
    return RunStore(root, "demo").open(CONFIG, **{"seed": 0, "labels": {"method": "window"}, **options})


def interrupted(root: Path) -> Run:
    """A run whose process was stopped after two chunks."""
    with pytest.raises(KeyboardInterrupt), opened(root) as run:
        for chunk in range(2):
            run.log({"psnr": 30.0 + chunk}, chunk=chunk, frame=4 * chunk)
            run.save_state({"next_chunk": chunk + 1, "cache": torch.full((2,), float(chunk))})
        raise KeyboardInterrupt
    return run


def test_a_complete_run_is_skipped(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        assert not run.finished and not run.resumed
        run.log({"psnr": 31.5, "custom": 2}, chunk=0, frame=0)
        run.log({"fps": 12.0})
    assert sorted(path.name for path in run.folder.iterdir()) == ["log.txt", TABLE, "summary.json"]
    before = (run.folder / "summary.json").read_bytes()
    with opened(tmp_path) as again:
        assert again.finished
        with pytest.raises(RuntimeError, match="closed"):
            again.log({"psnr": 0.0})
    assert (run.folder / "summary.json").read_bytes() == before
    rows = load(tmp_path / "**").set_index("metric")
    assert rows.loc["psnr", ["value", "unit", "chunk", "method", "status"]].tolist() == [
        31.5,
        "dB",
        0,
        "window",
        "done",
    ]
    assert rows.loc["custom", "unit"] == "" and rows["chunk"].isna()["fps"]


def test_other_seeds_are_other_runs(tmp_path: Path) -> None:
    folders = set()
    for seed in range(3):
        with opened(tmp_path, seed=seed) as run:
            run.log({"psnr": float(seed)}, chunk=0)
        folders.add(run.folder)
    assert len(folders) == 3 and set(load(tmp_path)["seed"]) == {0, 1, 2}


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    first = interrupted(tmp_path)
    with (first.folder / ROWS).open("a") as file:
        file.write('{"metric": "psnr", "chunk": 2, "va')  # killed while writing
    assert load_runs(tmp_path)["status"].tolist() == ["running"]
    assert load(tmp_path).empty, "an unfinished run was read as complete"
    assert len(load(tmp_path, partial=True)) == 2

    with opened(tmp_path) as run:
        assert run.resumed and run.has_state and len(run.rows()) == 2
        state = run.load_state()
        assert state["next_chunk"] == 2 and torch.equal(state["cache"], torch.ones(2))
        run.log({"psnr": 99.0}, chunk=1, frame=4)  # logged again: the later value counts
        run.log({"psnr": 32.0}, chunk=2, frame=8)
    assert not (run.folder / STATE).exists()
    assert load(tmp_path).sort_values("chunk")["value"].tolist() == [30.0, 99.0, 32.0]
    assert run.summary["starts"] == 2


def test_damage_inside_the_rows_is_not_passed_over(tmp_path: Path) -> None:
    run = interrupted(tmp_path)
    lines = (run.folder / ROWS).read_text().splitlines()
    (run.folder / ROWS).write_text("\n".join([lines[0][:10], lines[1], ""]))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        opened(tmp_path)
    assert not (run.folder / "lock").exists()


def test_damaged_summary_is_one_clear_sentence(tmp_path: Path) -> None:
    run = interrupted(tmp_path)
    (run.folder / "summary.json").write_text('{"run_id": "x"')
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        opened(tmp_path)


def test_completion_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any write of `complete`, the run is still unfinished and its rows are still there."""
    import fastar.results.run as store

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = opened(tmp_path)
    run.log({"psnr": 30.0}, chunk=0)
    monkeypatch.setattr(store, "write_table", die)
    with pytest.raises(KeyboardInterrupt):
        run.complete()
    monkeypatch.undo()
    assert not (run.folder / TABLE).exists() and not list(run.folder.glob("*.part"))
    run._lock.release()

    run = opened(tmp_path)
    monkeypatch.setattr(store, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        run.complete()
    monkeypatch.undo()
    assert (run.folder / TABLE).exists() and load(tmp_path).empty

    with opened(tmp_path) as run:
        assert [row["value"] for row in run.rows()] == [30.0]
    assert load(tmp_path)["value"].tolist() == [30.0]


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic(path) as part:
        part.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failure_is_a_row_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), opened(tmp_path) as run:
        run.log({"psnr": 30.0}, chunk=0)
        logging.getLogger("fastar.rollout").warning("frame 800 in %s", Path.cwd() / "conf")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore advice")
    with opened(tmp_path, seed=1) as fine:
        fine.log({"psnr": 31.0}, chunk=0)

    rows = load(tmp_path)
    failed = rows[rows["status"] == "failed"]
    assert failed["metric"].tolist() == ["failure"] and failed["value"].isna().all()
    assert failed["reason"].item() == "CUDA out of memory. Tried to allocate 20 GiB"
    assert rows[rows["status"] == "done"]["reason"].isna().all()
    failure = json.loads((run.folder / "summary.json").read_text())["failure"]
    assert failure["kind"] == "out of memory" and failure["where"].startswith("test_store.py:")
    assert failure["log"][-1].endswith(f" WARNING fastar.rollout: frame 800 in .{os.sep}conf")
    assert len(load(tmp_path, partial=True)) == 3, "the failed run's rows are kept"

    assert RunStore(tmp_path, "demo", retry_failed=False).open(CONFIG, seed=0).finished
    with opened(tmp_path) as retried:
        assert retried.resumed and retried.summary["failure"] is None
    assert set(load(tmp_path)["status"]) == {"done"}


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from fastar.results import RunStore\n"
        f"run = RunStore({str(tmp_path)!r}, 'demo').open({CONFIG!r}, seed=0)\n"
        "print('ready', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == "ready"
        with pytest.raises(
            RunLocked, match=rf"by process {other.pid} on host .* since .*: wait for it, or remove .*lock"
        ):
            opened(tmp_path)
        other.communicate("\n")
    with opened(tmp_path) as run:  # that process is gone without a word: its lock is taken over
        assert run.resumed


def test_only_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    locks = [RunLock(tmp_path) for _ in range(4)]
    locks[0].acquire()
    for other in locks[1:]:
        with pytest.raises(RunLocked):
            other.acquire()
        other.release()  # what is not held is not released
    assert locks[0].path.exists()
    locks[0].release()
    locks[1].acquire()


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, False),
        ({"boot": "another"}, True),
        ({"process_start": 1.0}, True),
        ({"pid": 2**22 + 5}, True),
        ({"host": "another", "boot": "another", "pid": 2**22 + 5}, False),
        ({"pid_namespace": "pid:[1]", "pid": 2**22 + 5}, False),
        ({"host": "another", "job": "77", "job_restart": 0}, True),
        ({"host": "another", "job": "77", "job_restart": 1}, False),
        ({"host": "another", "job": "78", "job_restart": 0}, False),
    ],
    ids=lambda value: "-".join(value) or "alive" if isinstance(value, dict) else "",
)
def test_which_locks_are_stale(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], stale: bool) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_stale({**this_process(), **change}) is stale


def test_a_lock_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"owner": "somebody"}')
    with pytest.raises(RunLocked, match="does not say who holds it"):
        lock_module.RunLock(tmp_path).acquire()


@pytest.mark.parametrize("left", [b"", b'{"host": "a', b"\x00\xff\x00"])
def test_a_lock_that_a_power_cut_left_is_taken_over(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "lock").write_bytes(left)
    lock = lock_module.RunLock(tmp_path)
    lock.acquire()
    assert lock.holder() is not None


def test_unwritable_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file, not a folder")
    with pytest.raises(
        ValueError, match=r"cannot write to .*demo.*: choose another place with paths\.outputs"
    ):
        opened(tmp_path / "outputs")


def test_summary_records_how_it_was_made_and_no_machine(tmp_path: Path) -> None:
    with opened(tmp_path, checkpoint_sha256="abc") as run:
        pass
    text = (run.folder / "summary.json").read_text()
    made_with = json.loads(text)["environment"]
    assert made_with["packages"]["torch"] == torch.__version__ and made_with["seeds"] == [0]
    assert (
        made_with["threads"] == torch.get_num_threads() and made_with["cpu"] and len(made_with["host"]) == 8
    )
    for private in (os.uname().nodename, str(Path.cwd()), str(tmp_path)):
        assert private not in text


def test_git_state_tells_commit_and_changes(tmp_path: Path) -> None:
    from fastar.results.provenance import code_of, git_state

    assert git_state(tmp_path) is None
    commands = ["init -q", "add a.py", "-c user.name=a -c user.email=a@b commit -qm one"]
    (tmp_path / "a.py").write_text("1")
    for command in commands:
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "a.py").write_text("2")
    assert state is not None and code_of({"git": state}) == state["commit"][:8]
    changed = git_state(tmp_path)
    assert changed and changed["dirty"] and code_of({"git": changed}) == f"{changed['commit'][:8]}+"
    assert code_of({"git": None}) == "unknown"
    (tmp_path / "ignored").mkdir()
    assert git_state(tmp_path / "ignored") is None, "an untracked folder is not this checkout's code"
