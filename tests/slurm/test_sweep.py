"""A comparison as a Slurm array, in which one job is preempted and one reaches its time limit, ends like any other."""

import os
import signal
from pathlib import Path

import pandas as pd
import pytest

from fastar.results import load, load_runs
from fastar.results.files import ROWS, read_rows, read_summary
from fastar.results.lock import RunLock
from tests.slurm.conftest import Cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOBS = 8
SWEEP = (
    "python", "experiments/compare.py", "-m", "debug=tiny", "metrics=fast", "videos=0", "method=[dense,tempcache]",
    "baseline=dense", "protocols=[B,C]", "source=heldout", "frames=64", "threads=1", "device=cpu",
    f"seeds={','.join(f'[{seed}]' for seed in range(JOBS))}",
)  # fmt: skip
TIMED = ("_s", "fps", "latency", "peak", "speedup")


def process_of(folder: Path, seed: int) -> int | None:
    """The process that is in the middle of a run of this seed: some chunks are made."""
    for lock in (folder / "compare").glob("*/lock"):
        summary, holder = read_summary(lock.parent), RunLock(lock.parent).holder()
        if (
            summary is not None
            and holder is not None
            and summary["seed"] == seed
            and read_rows(lock.parent / ROWS)
        ):
            return int(holder["pid"])
    return None


def halt(folder: Path, seeds: set[int]) -> dict[int, int]:
    """Stop the jobs of these seeds in the middle of a run; their processes."""
    halted: dict[int, int] = {}

    def all_halted() -> bool:
        for seed in seeds - halted.keys():
            process = process_of(folder, seed)
            if process is not None:
                os.kill(process, signal.SIGSTOP)
                halted[seed] = process
        return halted.keys() == seeds

    wait_for(all_halted, f"the jobs of seeds {seeds}", seconds=180)
    return halted


def is_pending(process: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a halted process."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1)


def untimed(folder: Path) -> pd.DataFrame:
    """What must not depend on where, when and how often a run was started."""
    rows = load(folder)
    rows = rows[[not any(part in name for part in TIMED) for name in rows["metric"]]]
    columns = ["run_id", "seed", "method", "protocol", "metric", "chunk", "frame", "clip", "value"]
    return rows[columns].sort_values(columns[:-1]).reset_index(drop=True)


def test_a_preempted_and_a_timed_out_job_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    on_slurm, plain = tmp_path / "slurm", tmp_path / "plain"
    sweep = cluster.start(
        *SWEEP, "launcher=slurm", "launcher.cpus=1", "launcher.minutes=30", "launcher.max_concurrent=3",
        "+launcher.sbatch.signal=CONT@1", f"paths.outputs={on_slurm}",  # so that only the time limit itself stops it
    )  # fmt: skip
    array = cluster.array_of(sweep, "compare")
    logs = [on_slurm / f"compare/.submitit/{array}_{task}/{array}_{task}_0_log.out" for task in range(JOBS)]
    halted = halt(on_slurm, {0, 1})
    # Slurm 22.05 delivers this and then says that it could not, while other tasks wait; scancel tries ten times.
    told_off = cluster.start("scancel", "--signal=USR1", f"{array}_1")
    wait_for(lambda: is_pending(halted[1], signal.SIGUSR1), "the signal")
    told_off.kill()
    os.kill(halted[1], signal.SIGCONT)
    cluster.run("scontrol", "update", f"JobId={array}_0", "TimeLimit=1")  # minute: there is no shorter one
    here = cluster.start(*SWEEP, f"paths.outputs={plain}")  # meanwhile

    def timed_out() -> bool:
        os.kill(halted[0], signal.SIGSTOP)  # again and again: whatever Slurm sends wakes it
        return "DUE TO TIME LIMIT" in logs[0].read_text()

    wait_for(timed_out, "the time limit", seconds=180)
    os.kill(halted[0], signal.SIGCONT)
    wait_for(lambda: cluster.states(array)[0] in ("PENDING", "RUNNING"), "its return to the queue")
    cluster.run("scontrol", "update", f"JobId={array}_0", "TimeLimit=30")
    told, told_here = sweep.communicate(timeout=500)[0], here.communicate(timeout=300)[0]

    assert here.returncode == 0, told_here
    assert sweep.returncode == 0, told
    assert f"{JOBS} jobs: {JOBS} done" in told
    assert "SIGTERM: stopping" in logs[0].read_text() and "SIGUSR1: stopping" in logs[1].read_text()
    starts = [log.read_text().count("Starting with JobEnvironment") for log in logs]
    assert starts[:2] == [2, 2], starts
    runs = load_runs(on_slurm)
    assert len(runs) == JOBS * 4 and set(runs["status"]) == {"done"}
    pd.testing.assert_frame_equal(untimed(on_slurm), untimed(plain), check_exact=True)
