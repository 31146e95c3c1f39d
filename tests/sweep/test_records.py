"""Jobs are known by what they are; what is not done is shown, and the printed command does just that."""

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from fastar.results import RunStore, load, run_id
from fastar.results.files import read_summary
from fastar.results.loading import FAILURE
from fastar.results.lock import RunLock, this_process
from fastar.results.run import Run
from fastar.sweep.callback import expand
from fastar.sweep.records import (
    JobRecord,
    essential,
    forget_waiting,
    job_key,
    read_record,
    read_sweep_file,
    record_of,
    take,
)
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
    assert command in {
        f"python experiments/compare.py -m a={values} paths.outputs={tmp_path}" for values in ("2,3", "3,2")
    }


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


def test_commands_for_the_rest_are_few_and_cover_it() -> None:
    """Six of nine points of a grid: no command does one that is done."""
    grid = [("experiment=x", f"a={a}", f"b={b}") for a in range(3) for b in range(3)]
    left = [point for point in grid if point not in (grid[0], grid[4], grid[8])]
    jobs = Path("outputs/x/jobs")
    records = [JobRecord(jobs / job_key(point), "compare.py", list(point)) for point in left]
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


def test_the_spelling_of_overrides_does_not_matter() -> None:
    assert job_key(["method=[dense, window]", "frames=8", "x=0.10"]) == job_key(
        ["frames=8", "method=[dense,window]", "x=0.1"]
    )
    assert essential(["~metrics.psnr", "seeds=[0,1]"]) == ["~metrics.psnr", "seeds=[0,1]"]


def test_the_printed_command_finds_the_folder_again(tmp_path: Path) -> None:
    odd = tmp_path / "it's [v1]"
    jobs = [job(odd / "sweep", f"a={value}", status="waiting") for value in (1, 2)] + [
        job(odd / "sweep", "~b")
    ]
    swept, single = (shlex.split(command) for command in rerun_commands(jobs))
    assert swept[:4] == ["python", "experiments/compare.py", "-m", "a=1,2"] and single[2] == "~b"
    for words in (swept, single):
        places = [word for word in words if word.startswith("paths.outputs=")]
        [place] = OverridesParser.create().parse_overrides(places)
        assert place.value() == str(odd)


def test_a_job_that_has_still_to_begin_may_plan_other_runs(tmp_path: Path) -> None:
    record = job(tmp_path / "sweep", "a=1", status="waiting")
    with opened(tmp_path / "sweep", 0, "a=1"):
        pass
    assert [state for _, state in survey(tmp_path / "sweep").jobs] == ["waiting"]
    record.status, record.failure = "failed", {"kind": "killed", "reason": "its process ended"}
    record.save()
    assert [state for _, state in survey(tmp_path / "sweep").jobs] == ["done"], (
        "another process finished its runs"
    )


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    job(tmp_path / "sweep", "a=1", runs=2)
    for seed in range(2):
        with opened(tmp_path / "sweep", seed, "a=1") as run:
            pass
    (run.folder / "summary.json").write_text("{")
    runs = survey(tmp_path / "sweep").runs
    assert sorted(run["state"] for run in runs) == ["done", "failed"]
    assert any("is damaged" in str(run.get("reason")) for run in runs)


def test_lines_of_a_sweep_file_that_never_began_are_missing(tmp_path: Path) -> None:
    job(tmp_path / "sweep", "a=1")
    with opened(tmp_path / "sweep", 0, "a=1"):
        pass
    (tmp_path / "sweep.txt").write_text("a=1 paths.outputs=elsewhere\n\n'a=[x, y]' b=2\n")
    asked = read_sweep_file(tmp_path / "sweep.txt", tmp_path / "sweep")
    states = {
        tuple(record.overrides): state for record, state in survey(tmp_path / "sweep", asked=asked).jobs
    }
    assert states == {("a=1",): "done", ("a=[x,y]", "b=2"): "missing"}
    for wrong in ("'a=1", "a=[1"):
        (tmp_path / "sweep.txt").write_text(f"a=1\n{wrong}\n")
        with pytest.raises(ValueError, match=r"line 2 of .*sweep\.txt cannot be read"):
            read_sweep_file(tmp_path / "sweep.txt", tmp_path / "sweep")


def test_jobs_that_slurm_refused_are_forgotten(tmp_path: Path) -> None:
    for override, runs, status in (("a=10", 0, "waiting"), ("a=9", 0, "waiting"), ("a=2", 1, "waiting")):
        job(tmp_path / "sweep", override, runs=runs, status=status)
    assert [record.overrides for record, _ in survey(tmp_path / "sweep").jobs] == [["a=2"], ["a=9"], ["a=10"]]
    forget_waiting(tmp_path / "sweep", [["a=10"], ["a=2"], ["a=3"]])
    assert [record.overrides for record, _ in survey(tmp_path / "sweep").jobs] == [["a=2"], ["a=9"]]
