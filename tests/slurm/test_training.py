"""A training as a job of `launcher=slurm`: it gives way to a job of higher priority and goes on; a failure is told."""

import json
import re
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster, wait_for
from tests.training.small import moving_bars

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

STEPS = 400
ON_SLURM = ("launcher=slurm", "launcher.partition=main", "launcher.cpus=1")


def train(*overrides: str, output: Path) -> tuple[str, ...]:
    stages = ["training.stages=[transformer]", f"training.transformer.max_steps={STEPS}"]
    return (
        "python",
        "experiments/train.py",
        *moving_bars(output, *stages),
        f"paths.outputs={output.parent}",
        *overrides,
    )


def result(folder: Path) -> str:
    """What tells these weights from all others."""
    return str(json.loads((folder / "checkpoint/config.json").read_text())["sha256"])


def test_preempted_by_a_partition_of_higher_priority_it_ends_with_the_same_bits(
    cluster: Cluster, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training = cluster.start(*train(*ON_SLURM, output=parts))
    job = cluster.array_of(training, "train")
    wait_for(lambda: (parts / "transformer/metrics.csv").exists(), "the first row of metrics")
    cluster.submit("--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    here = cluster.start(*train(output=whole))  # meanwhile
    told = training.communicate(timeout=150)[0]
    assert training.returncode == 0, told
    assert f"job {job}" in told and "has ended well" in told
    log = (tmp_path / f"train/.submitit/{job}/{job}_0_log.out").read_text()
    assert "stopping at the next safe point" in log
    assert here.wait(timeout=100) == 0
    assert result(parts) == result(whole)


def test_a_training_that_fails_fails_its_job_and_its_command(cluster: Cluster, tmp_path: Path) -> None:
    training = cluster.start(*train(*ON_SLURM, "+data.train.fails_at=40", output=tmp_path / "failing"))
    told = training.communicate(timeout=120)[0]
    assert training.returncode == 1 and "the power went off" in told and "Traceback" not in told, told
    [job] = set(re.findall(r"job (\d+) \(", told))
    wait_for(lambda: cluster.states(job) == ["FAILED"], "the end of the job")
