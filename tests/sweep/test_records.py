"""Jobs are known by what they are; what is not done is shown, and the printed command does just that."""

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fastar.results import RunStore, load, run_id
from fastar.results.files import read_summary
from fastar.results.loading import FAILURE
from fastar.results.lock import RunLock, this_process
from fastar.results.store import Run
from fastar.sweep.callback import expand
from fastar.sweep.records import JobRecord, essential, job_key, read_record, record_of, take
from fastar.sweep.resolvers import layers_of
from fastar.sweep.status import bury_dead, count_rows, rerun_commands, survey, widest

CONF = Path(__file__).resolve().parents[2] / "conf"
GONE = {"pid": 2**22 + 5}  # no process has such a number


def job(folder: Path, override: str, runs: int = 1, status: str = "done") -> JobRecord:
    """A job whose runs, seeds 0, 1, ..., are planned and not begun."""
    record = record_of(folder, "compare.py", [override])
    record.status = status
    labels = {"method": "window", "protocol": "C", "backbone": "tiny", "budget_share": 0.15}
    planned = (run_id({"of": override}, seed=seed) for seed in range(runs))
    record.plan([{"run_id": name, "seeds": [seed], **labels} for seed, name in enumerate(planned)])
    return record


def opened(folder: Path, seed: int, override: str) -> Run:
    """One of these runs."""
    return RunStore(folder.parent, folder.name).open({"of": override}, seed=seed, labels={"method": "window"})


def dead(lock: RunLock) -> None:
    """Make a lock look as if its process had been killed."""
    lock.path.write_text(json.dumps({**this_process(), **GONE}))


def test_a_job_is_what_its_overrides_say_in_any_order_and_wherever_it_runs() -> None:
    here = [
        "experiment=frontier",
        "budget_share=0.1",
        "launcher=slurm",
        "launcher.partition=gpu",
        "hydra.verbose=true",
    ]
    there = ["paths.outputs=/data", "budget_share=0.1", "logger=wandb", "experiment=frontier", "force=true"]
    assert job_key(here) == job_key(there) != job_key(["experiment=frontier", "budget_share=0.2"])
    assert essential([*here, "+launcher.extra=1", "~logger", "ann@methods.x.cache.matcher=lsh"]) == [
        "experiment=frontier", "budget_share=0.1", "ann@methods.x.cache.matcher=lsh",
    ]  # fmt: skip


def test_a_record_is_kept_and_a_damaged_one_is_one_sentence(tmp_path: Path) -> None:
    record = job(tmp_path, "a=1", runs=2)
    assert read_record(record.folder) == record
    (record.folder / "job.json").write_text('{"program": ')
    with pytest.raises(ValueError, match=r"job\.json is not the record of a job .*: remove it"):
        read_record(record.folder)


def test_states_of_runs_and_jobs(tmp_path: Path) -> None:
    """done, running, waiting, failed and missing at once; a job is done when all of its runs are."""
    folder = tmp_path / "sweep"
    job(folder, "a=1", runs=1)
    job(folder, "a=2", runs=5)
    job(folder, "a=3", runs=0, status="waiting")
    with opened(folder, 0, "a=1"):
        pass
    with opened(folder, 0, "a=2"):
        pass
    with pytest.raises(RuntimeError), opened(folder, 1, "a=2"):
        raise RuntimeError("no kernel for this head size\nand more")
    with pytest.raises(KeyboardInterrupt), opened(folder, 2, "a=2"):
        raise KeyboardInterrupt
    with opened(folder, 3, "a=2"):
        found = survey(folder)
    assert {tuple(record.overrides): state for record, state in found.jobs} == {
        ("a=1",): "done",
        ("a=2",): "failed",
        ("a=3",): "missing",
    }
    assert found.counts() == {"done": 2, "failed": 1, "waiting": 1, "running": 1, "missing": 1}
    assert [run["reason"] for run in found.runs if run["state"] == "failed"] == [
        "no kernel for this head size"
    ]
    [row] = count_rows(found.runs)
    assert row == {
        "protocol": "C", "method": "window budget_share=0.15", "done": 2, "running": 1, "waiting": 1, "failed": 1,
        "missing": 1,
    }  # fmt: skip
    [command] = rerun_commands(found.unfinished)
    assert command == "python experiments/compare.py -m a=2,3" or command.endswith("a=3,2")


def test_a_killed_process_becomes_a_failed_row_that_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    record = job(folder, "a=1", runs=1, status="running")
    lock = take(record, "12_3")
    assert lock is not None
    run = opened(folder, 0, "a=1")
    run.log({"psnr": 30.0}, chunk=0, frame=0)
    run.save_state({"chunk": 1})
    assert bury_dead(folder) == [], "both live"
    dead(run._lock)
    dead(lock)
    assert bury_dead(folder) == [run.folder]
    summary = read_summary(run.folder)
    assert summary is not None and summary["failure"]["kind"] == "killed"
    assert "ended without a word" in summary["failure"]["reason"]
    rows = load(folder)
    assert rows["metric"].tolist() == [FAILURE] and "ended without a word" in rows["reason"].item()
    found = survey(folder)
    assert [state for _, state in found.jobs] == ["failed"]
    assert found.jobs[0][0].failure == {
        "kind": "killed",
        "reason": "its process ended without a word (Slurm job 12_3)",
    }
    with opened(folder, 0, "a=1") as again:
        assert again.resumed and again.has_state and len(again.rows()) == 1
    assert survey(folder).counts() == {"done": 1}


def test_commands_for_the_rest_are_few_and_cover_it(tmp_path: Path) -> None:
    """Six of nine points of a grid: no command does one that is done."""
    grid = [("experiment=x", f"a={a}", f"b={b}") for a in range(3) for b in range(3)]
    left = [point for point in grid if point not in (grid[0], grid[4], grid[8])]
    records = [JobRecord(tmp_path / job_key(point), "compare.py", list(point)) for point in left]
    commands = rerun_commands(records)
    done: set[tuple[str, ...]] = set()
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "experiments/compare.py"]
        overrides = [word for word in words[2:] if word != "-m"]
        with initialize_config_dir(config_dir=str(CONF), version_base=None):
            whole = compose("compare", overrides=[], return_hydra_config=True)
        whole.hydra.overrides.task = overrides
        done |= {tuple(point) for point in expand(whole)}
    as_sets = {frozenset(point) for point in done}
    assert as_sets == {frozenset(point) for point in left} and len(commands) <= 4


def test_the_widest_sweep_takes_the_most_jobs() -> None:
    jobs = [("x=1", "y=1"), ("x=1", "y=2"), ("x=2", "y=1"), ("x=3", "y=1")]
    chosen, fixed, swept = widest(jobs)
    assert len(chosen) == 3 and fixed == ["y=1"] and swept == ["x=1,2,3"]


def test_no_jobs_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no jobs are recorded in .*: give the folder of a sweep"):
        survey(tmp_path)


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("all", [0, 1, 2, 3]),
        ("first_50", [0, 1]),
        ("last_70", [1, 2, 3]),
        ("last_0", []),
        ("first_100", [0, 1, 2, 3]),
    ],
)
def test_layers_by_name(choice: str, layers: list[int]) -> None:
    assert layers_of(choice, 4) == layers


@pytest.mark.parametrize("choice", ["some", "first_", "last_101"])
def test_layers_of_no_such_name(choice: str) -> None:
    with pytest.raises(ValueError, match="layers are named all, or first_70 and last_70"):
        layers_of(choice, 4)
