"""The batch scripts in slurm/ on a real Slurm."""

import shutil
from pathlib import Path

import pytest

from fastar.results import load_runs
from tests.slurm.conftest import Cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

SMALL = ("--cpus-per-task=1", "--time=20")


def log_of(cluster: Cluster, job: str, log: Path, *, ended: str = "COMPLETED") -> str:
    """What a job (or all tasks of an array) wrote, once it has ended as it should."""
    over = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
    wait_for(lambda: set(cluster.states(job)) <= over, f"the end of job {job}", seconds=240)
    written = "".join(path.read_text() for path in sorted(log.parent.glob(log.name)))
    assert set(cluster.states(job)) == {ended}, written
    return written


def test_an_array_runs_the_lines_of_a_sweep_file(cluster: Cluster, tmp_path: Path) -> None:
    line = (
        "experiment=frontier debug=tiny source=heldout 'method=[dense, window]' baseline=window "
        f"'protocols=[C]' seeds=[{{seed}}] 'paths.outputs={tmp_path}' threads=1"
    )
    (tmp_path / "sweep.txt").write_text("".join(line.format(seed=seed) + "\n" for seed in (3, 5)))
    script = "slurm/compare_array.sbatch"
    log = f"--output={tmp_path}/%a.log"
    job = cluster.submit("--array=1-2", *SMALL, log, script, tmp_path / "sweep.txt")
    missing = cluster.submit(
        "--array=3", *SMALL, f"--output={tmp_path}/missing", script, tmp_path / "sweep.txt"
    )
    log_of(cluster, job, tmp_path / "[12].log")
    assert "sweep.txt is empty, or there are fewer" in log_of(
        cluster, missing, tmp_path / "missing", ended="FAILED"
    )
    runs = load_runs(tmp_path / "frontier")
    assert sorted(runs["seed"]) == [3, 3, 5, 5] and set(runs["status"]) == {"done"}


def test_training_on_two_tasks(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        "--ntasks-per-node=2", "--gpus-per-node=2", *SMALL, f"--output={tmp_path}/train.log", "slurm/train.sbatch",
        "backbone=tiny", "data=doom_tiny", "training=tiny", "training.autoencoder.max_steps=2",
        "training.transformer.max_steps=2", "training.autoencoder.statistics_clips=1", f"output={tmp_path}/run",
    )  # fmt: skip
    written = log_of(cluster, job, tmp_path / "train.log")
    assert "[rank: 1]" in written, written  # two that are not connected would refuse each other's folder
    assert (tmp_path / "run/checkpoint/config.json").exists(), written


def test_a_step_is_not_ended_by_the_signal_that_its_work_heeds(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    script = tmp_path / "count.sbatch"
    script.write_text(
        "#!/bin/bash\nset -euo pipefail\nsource slurm/step.sh\n"
        f"step python tests/slurm/count.py job=$SLURM_ARRAY_TASK_ID paths.outputs={tmp_path}\necho after\n"
    )
    job = cluster.submit("--array=0-2", *SMALL, "--requeue", "--open-mode=append",
                         f"--output={tmp_path}/%a.log", script)  # fmt: skip
    counts = [tmp_path / f"count/{task}.txt" for task in range(3)]
    wait_for(lambda: all(path.exists() for path in counts), "three jobs that count")
    cluster.run("scancel", "--signal=USR1", f"{job}_0")
    cluster.run("scancel", "--signal=USR1", "--full", f"{job}_1")  # the batch script too
    cluster.run("scancel", f"{job}_2")
    wait_for(lambda: cluster.states(job) == ["COMPLETED", "COMPLETED", "CANCELLED"], "their ends", seconds=90)
    starts = [{line.split()[1] for line in path.read_text().splitlines()} for path in counts]
    assert starts == [{"0", "1"}, {"0", "1"}, {"0"}]
    assert [len(path.read_text().splitlines()) == 40 for path in counts] == [True, True, False]


def test_scripts_are_submitted_in_the_repository(cluster: Cluster, tmp_path: Path) -> None:
    assert shutil.which("sbatch", path=cluster.environment["PATH"])
    script = Path("slurm/train.sbatch").resolve()
    job = cluster.submit("--ntasks-per-node=1", "--gpus-per-node=1", *SMALL, f"--chdir={tmp_path}",
                         f"--output={tmp_path}/log", script)  # fmt: skip
    assert "submit this in the repository's folder" in log_of(cluster, job, tmp_path / "log", ended="FAILED")
