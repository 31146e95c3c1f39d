"""`force=true` begins a run anew: once a launch, and with nothing of what was there."""

from pathlib import Path

import pytest
import torch

from fastar.results import RunStore, load
from fastar.results.files import ROWS, STATE, SUMMARY, read_summary
from fastar.results.run import Run


def forced(root: Path, launch: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FASTAR_LAUNCH", launch)
    return RunStore(root, "demo", force=True).open({"a": 1}, seed=0)


def done(root: Path, launch: str, monkeypatch: pytest.MonkeyPatch, value: float = 1.0) -> bool:
    """Whether the run was done now, not skipped."""
    with forced(root, launch, monkeypatch) as run:
        if run.finished:
            return False
        run.log({"psnr": value}, chunk=0)
    return True


def test_each_launch_does_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that share runs do not undo each other's for ever."""
    assert [done(tmp_path, launch, monkeypatch) for launch in "xyxyx"] == [True, True, False, False, False]


def test_killed_while_it_removes_nothing_old_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), forced(tmp_path, "x", monkeypatch) as run:
        run.log({"psnr": 0.0}, chunk=99)
        run.save_state({"old": torch.ones(1)})
        raise KeyboardInterrupt
    (run.folder / SUMMARY).unlink()  # as far as the next one came
    with forced(tmp_path, "y", monkeypatch) as run:
        assert not run.resumed and not run.has_state and not run.rows()
        run.log({"psnr": 1.0}, chunk=0)
    assert load(tmp_path)["chunk"].tolist() == [0]


def test_a_run_that_another_process_begins_anew_is_not_tidied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert done(tmp_path, "x", monkeypatch)
    stale = read_summary(next(tmp_path.glob("demo/*")))
    with forced(tmp_path, "y", monkeypatch) as run:
        run.log({"psnr": 2.0}, chunk=0)
        monkeypatch.setattr("fastar.results.run.read_summary", lambda folder: stale)  # read before y began
        monkeypatch.setenv("FASTAR_LAUNCH", "x")
        assert RunStore(tmp_path, "demo").open({"a": 1}, seed=0).finished
        monkeypatch.undo()
        assert (run.folder / ROWS).exists()
    assert load(tmp_path)["value"].tolist() == [2.0]


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "cut"])
def test_a_damaged_state_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setenv("FASTAR_LAUNCH", "x")
    with pytest.raises(KeyboardInterrupt), forced(tmp_path, "x", monkeypatch) as run:
        run.save_state({"cache": torch.ones(1000)})
        raise KeyboardInterrupt
    path = run.folder / STATE
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    with (
        pytest.raises(ValueError, match=r"state\.pt is damaged .*: remove the folder"),
        forced(tmp_path, "x", monkeypatch) as run,
    ):
        run.load_state()
