"""`launcher=slurm`: jobs of a sweep as one Slurm array, through submitit; one that is killed does not end the sweep."""

import logging
import math
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from fastar.sweep.job import job_return
from fastar.sweep.records import forget_waiting

log = logging.getLogger(__name__)

MOST_SHOWN = 120  # letters of a job's overrides
SECONDS_BETWEEN_LOOKS = 20
NEVER = ("Partition", "BadConstraints", "Assoc", "QOSMax", "InvalidAccount", "InvalidQOS")
"""Reasons of Slurm's for waiting that mostly do not go away."""


class SlurmLauncher(Launcher):
    """Submits, and waits until all jobs have ended.

    What runs in the jobs, and goes back to the queue with them, is Hydra's own submitit launcher. That one ends with
    the first job that was cancelled or killed, and knows neither srun's options nor a Python inside a container.

    Args:
        folder: of logs and submitted pickles; %j stands for the job.
        srun: its options, as in a shell.
        python: command that starts Python in a job; None for the Python of this process.
        max_num_timeout: how often a job that reached its time limit goes back to the queue.
        sbatch: settings of `submitit.SlurmExecutor.update_parameters`, which are sbatch's options with underscores.
    """

    def __init__(
        self, *, folder: str, srun: str, python: str | None, max_num_timeout: int, **sbatch: Any
    ) -> None:
        self.folder, self.python, self.max_num_timeout = folder, python, max_num_timeout
        plain = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in sbatch.items()
        }
        self.sbatch = {name: value for name, value in plain.items() if value is not None}
        self.sbatch["srun_args"] = shlex.split(srun)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs. What came of one that ended without a word is told; its record says it too, if it keeps one.

        A program without records, such as a training, ends with exit status 1 if a job failed.
        """
        jobs = self.submit(job_overrides, initial_job_idx)
        failed = False
        try:
            for job in as_they_end(jobs):
                problem = outcome(job)
                failed = failed or problem is not None
                if problem is not None:
                    overrides = " ".join(job_overrides[jobs.index(job)])
                    shown = overrides if len(overrides) < MOST_SHOWN else f"{overrides[:MOST_SHOWN]} ..."
                    log.error("job %s (%s): %s; log: %s", job.job_id, shown, problem, job.paths.stdout)
                elif not self.keeps_records:
                    log.info("job %s has ended well; log: %s", job.job_id, job.paths.stdout)
        except KeyboardInterrupt:
            ids = jobs[0].job_id.split("_")[0]
            raise SystemExit(f"the jobs stay in Slurm's queue; to end them: scancel {ids}") from None
        if failed and not self.keeps_records:
            raise SystemExit(1)
        return [job_return(overrides) for overrides in job_overrides]

    @property
    def keeps_records(self) -> bool:
        """Whether the program's jobs have records (`fastar.sweep.records`)."""
        return "sweep" in (self.config.hydra.get("callbacks") or {})

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Hand the jobs to sbatch: as an array if there are several."""
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit
            from submitit import SlurmExecutor
            from submitit.core.utils import FailedJobError
        except ImportError as error:
            raise SystemExit(
                "error: launcher=slurm needs Hydra's submitit launcher: pip install -e '.[launchers]'"
            ) from error
        run = Submitit()
        run.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        state = Singleton.get_state()
        arguments = [
            (list(overrides), "hydra.sweep.dir", number, f"job_{number}", state)
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        try:
            executor = SlurmExecutor(self.folder, max_num_timeout=self.max_num_timeout, python=self.python)
            executor.update_parameters(**self.sbatch)
            jobs: list[Any] = executor.map_array(InJob(run), *zip(*arguments, strict=True))
        except RuntimeError as error:  # FailedJobError: sbatch refused
            what = (
                str(error).strip()
                if isinstance(error, FailedJobError)
                else "there is no srun on this machine"
            )
            if self.keeps_records:
                forget_waiting(Path(str(self.config.paths.outputs)) / str(self.config.name), job_overrides)
            raise SystemExit(f"error: launcher=slurm: {what}") from error
        log.info("%d jobs in Slurm's queue, %s to %s; logs: %s", len(jobs), jobs[0].job_id, jobs[-1].job_id,
                 Path(self.folder).parent)  # fmt: skip
        return jobs


class InJob:
    """What runs in a job: `run`, Hydra's own launcher there; an error ends the job with its traceback and a status."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, *arguments: Any) -> JobReturn:
        returned: JobReturn = self.run(*arguments)
        _ = returned.return_value  # raises what the work raised
        return returned

    def checkpoint(self, *arguments: Any, **options: Any) -> Any:
        """Called by submitit before it puts the job back into the queue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments, **options)


def as_they_end(jobs: Sequence[Any]) -> Iterator[Any]:
    """Jobs as they end; meanwhile, whenever that changes, how many run and why others wait."""
    left, shown, looked = list(jobs), "", -math.inf
    while left:
        for job in [job for job in left if job.done()]:
            left.remove(job)
            yield job
        if left and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
            line, looked = queue_line(jobs[0].job_id.split("_")[0]), time.monotonic()
            if line and line != shown:
                log.info("%s", line)
            shown = line
        time.sleep(1 if left else 0)


def queue_line(job: str) -> str:
    """What squeue says of a job or an array, in a line; empty if it says nothing."""
    command = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # it is only for the person to know
        return ""
    states = Counter(tuple(line.split("|", 1)) for line in answer.stdout.splitlines() if "|" in line)
    parts = [
        f"{count} {state.lower()}" + (f" ({reason})" if reason not in ("None", "") else "")
        for (state, reason), count in sorted(states.items())
    ]
    stuck = sorted({reason for _, reason in states if reason.startswith(NEVER)})
    told = f"in Slurm's queue: {', '.join(parts)}" if parts else ""
    if stuck:
        told += "; that does not go away by itself: ask for less (launcher.minutes, launcher.cpus, ...)"
    return told


def outcome(job: Any) -> str | None:
    """Wait for a job; what went wrong outside of its work, if anything did."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        returned = [result for result in job.results() if result.status != JobStatus.COMPLETED]
    except FailedJobError as error:
        # submitit's sentence, the traceback between two rules, which is in the log, and where the log is
        parts = re.split(r"^-{10,}$", str(error), flags=re.MULTILINE)
        return parts[1 if len(parts) > 1 else 0].strip().splitlines()[-1]
    except UncompletedJobError:
        return f"Slurm says {job.state}"
    return str(returned[0]._return_value) if returned else None
