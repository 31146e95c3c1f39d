"""A sweep from the command line, one job after another: records first, one report for each kind of runs, a status."""

from pathlib import Path

import pytest

from fastar.results import load, load_runs
from fastar.sweep.records import read_records
from tests.experiments.conftest import command

SMALL = ("debug=tiny", "source=heldout", "prefill_frames=16", "metrics=fast", "seeds=1", "name=sweep")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_of_two_lengths_get_a_report_each_and_a_failing_point_is_a_row(tmp_path: Path) -> None:
    work = ("method=[dense,window]", "protocols=[B]", "frames=8,16", "budget_share=0.2,0.0001", "logger=csv")
    first = command("compare.py", "-m", *SMALL, *work, f"paths.outputs={tmp_path}")
    assert first.returncode == 1, "not everything could be done"
    assert "Traceback" not in first.stdout + first.stderr
    assert "4 jobs: 2 done, 2 failed" in first.stdout
    folder = tmp_path / "sweep"
    assert sorted(path.name for path in folder.glob("report*")) == ["report_1", "report_2"]
    for report in folder.glob("report*"):
        assert "window 20%" in (report / "results.md").read_text()
        assert "failed runs" in (report / "results.md").read_text()
        assert list(report.glob("*.csv")), "handed to the logger"
    runs = load_runs(folder)
    assert runs.groupby("status").size().to_dict() == {"done": 6, "failed": 2}
    assert runs["reason"].dropna().str.contains("cache budget").all()
    assert set(load(folder)["budget_share"].dropna()) == {0.2, 0.0001}

    shown = command("status.py", f"runs={folder}", f"sweep_file={tmp_path / 'todo.txt'}")
    assert shown.returncode == 0, shown.stderr
    assert "4 jobs: 2 done, 2 failed" in shown.stdout and "the cache budget" in shown.stdout
    [line] = [
        line for line in shown.stdout.splitlines() if line.startswith("  python experiments/compare.py")
    ]
    assert "-m" in line and "frames=8,16" in line and "budget_share=0.0001" in line
    todo = (tmp_path / "todo.txt").read_text().splitlines()
    assert len(todo) == 2 and all("budget_share=0.0001" in overrides for overrides in todo)
    assert all(f"paths.outputs={tmp_path}" in overrides for overrides in todo)
    assert not any("logger" in overrides for overrides in todo)
    assert len(list(read_records(folder))) == 4


def test_a_folder_without_a_sweep_is_one_sentence(tmp_path: Path) -> None:
    shown = command("status.py", f"runs={tmp_path}")
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: no jobs are recorded in") and "Traceback" not in shown.stderr
