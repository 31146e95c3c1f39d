"""`launcher=slurm` on a real Slurm: signals, cancelling, containers, refusals; and the cluster itself."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import ONE_NODE, Cluster, lines_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

COUNT = ("python", "tests/slurm/count.py", "-m", "launcher=slurm", "launcher.cpus=1")
CHUNKS = 40


def counted(folder: Path, job: int) -> list[list[str]]:
    """number, start and process of each chunk that a job of count.py has done."""
    return [line.split() for line in lines_of(folder / f"count/{job}.txt")]


def all_began(folder: Path, jobs: int) -> bool:
    return all(counted(folder, job) for job in range(jobs))


def check_finished(folder: Path, job: int, *, starts: int) -> None:
    """Every chunk was done once, in order, over so many starts."""
    chunks = counted(folder, job)
    assert [int(number) for number, _, _ in chunks] == list(range(CHUNKS))
    assert sorted({start for _, start, _ in chunks}) == [str(start) for start in range(starts)]


def test_jobs_that_are_asked_to_stop_go_on_and_cancelled_ones_do_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = cluster.start(*COUNT, "job=range(6)", f"paths.outputs={tmp_path}")
    array = cluster.array_of(sweep, "count")
    wait_for(lambda: all_began(tmp_path, 6), "six jobs that count")
    for task, number in enumerate(("USR1", "USR2", "TERM"), start=1):
        cluster.run("scancel", f"--signal={number}", f"{array}_{task}")
    cluster.run("scancel", f"{array}_4")
    os.kill(int(counted(tmp_path, 5)[0][2]), signal.SIGKILL)
    told = sweep.communicate(timeout=120)[0]

    check_finished(tmp_path, 0, starts=1)
    for task in (1, 2, 3):
        check_finished(tmp_path, task, starts=2)
    for task in (4, 5):
        assert 0 < len(counted(tmp_path, task)) < CHUNKS
    assert f"job {array}_4" in told and "CANCELLED" in told, told
    assert f"job {array}_5" in told and "Traceback" not in told, told
    assert cluster.states(array)[4] == "CANCELLED"
    assert (
        "was cancelled and stays so"
        in (tmp_path / f"count/.submitit/{array}_4/{array}_4_0_log.out").read_text()
    )


def test_a_run_in_a_container_goes_back_through_its_batch_script(cluster: Cluster, tmp_path: Path) -> None:
    inside = tmp_path / "python-inside"  # where there is no scontrol
    inside.write_text('#!/bin/sh\nPATH=/nowhere exec "$VIRTUAL_ENV/bin/python" "$@"\n')
    inside.chmod(0o755)
    sweep = cluster.start(
        *COUNT, f"launcher.python={inside}", "launcher.srun='--kill-on-bad-exit=1 --label'",
        "launcher.setup='export FROM_SETUP=1'", f"paths.outputs={tmp_path}",
    )  # fmt: skip
    job = cluster.array_of(sweep, "count")
    wait_for(lambda: all_began(tmp_path, 1), "a job that counts")
    cluster.run("scancel", "--signal=USR1", job)
    told = sweep.communicate(timeout=120)[0]
    check_finished(tmp_path, 0, starts=2)
    log = (tmp_path / f"count/.submitit/{job}/{job}_0_log.out").read_text()
    assert "there is no scontrol here" in log and "\n0: " in log
    assert "Slurm says" not in told


def test_what_slurm_refuses_is_said_in_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    sweep = cluster.start(*COUNT, "launcher.partition=nowhere", f"paths.outputs={tmp_path}")
    told = sweep.communicate(timeout=60)[0]
    assert sweep.returncode != 0
    assert (
        "error: launcher=slurm:" in told and "invalid partition" in told.lower() and "Traceback" not in told
    ), told


def test_up_and_down_say_what_is_wrong(cluster: Cluster, tmp_path: Path) -> None:
    def answer(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [ONE_NODE / script, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1, done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "usage" in answer("up.sh") and "usage" in answer("up.sh", "/tmp/x", "--nodes", "many")
    assert "absolute path" in answer("up.sh", "somewhere")
    assert "80" in answer("up.sh", f"/tmp/{'x' * 80}")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    assert "cannot read" in answer("up.sh", str(closed))
    port = next(
        line for line in lines_of(cluster.root / "etc/slurm.conf") if line.startswith("SlurmctldPort=")
    ).split("=")[1]
    other = cluster.root / "other"
    assert f"port {port} is in use" in answer("up.sh", str(other), "--port", port)
    assert "there is no cluster" in answer("down.sh", str(tmp_path / "none"))
    again = subprocess.run([ONE_NODE / "up.sh", cluster.root], capture_output=True, text=True, check=True)
    assert "runs already" in again.stdout
