"""`launcher=slurm`: jobs of a sweep as one Slurm array, through submitit; one that is killed does not end the sweep."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from fastar.sweep.job import job_return

log = logging.getLogger(__name__)


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
        """All jobs. What came of one that ended without a word is told, and is for its record to say."""
        jobs = self.submit(job_overrides, initial_job_idx)
        try:
            for job, overrides in zip(jobs, job_overrides, strict=True):
                problem = outcome(job)
                if problem is not None:
                    log.error(
                        "job %s (%s): %s; log: %s", job.job_id, " ".join(overrides), problem, job.paths.stdout
                    )
        except KeyboardInterrupt:
            ids = jobs[0].job_id.split("_")[0]
            raise SystemExit(f"the jobs stay in Slurm's queue; to end them: scancel {ids}") from None
        return [job_return(overrides) for overrides in job_overrides]

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Hand the jobs to sbatch: as an array if there are several."""
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as InJob
            from submitit import SlurmExecutor
            from submitit.core.utils import FailedJobError
        except ImportError as error:
            raise SystemExit(
                "error: launcher=slurm needs Hydra's submitit launcher: pip install 'fastar[launchers]'"
            ) from error
        run = InJob()
        run.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        state = Singleton.get_state()
        arguments = [
            (list(overrides), "hydra.sweep.dir", number, f"job_{number}", state)
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        try:
            executor = SlurmExecutor(self.folder, max_num_timeout=self.max_num_timeout, python=self.python)
            executor.update_parameters(**self.sbatch)
            jobs: list[Any] = executor.map_array(run, *zip(*arguments, strict=True))
        except RuntimeError as error:  # FailedJobError: sbatch refused
            what = (
                str(error).strip()
                if isinstance(error, FailedJobError)
                else "there is no srun on this machine"
            )
            raise SystemExit(f"error: launcher=slurm: {what}") from error
        log.info("%d jobs in Slurm's queue, %s to %s; logs: %s", len(jobs), jobs[0].job_id, jobs[-1].job_id,
                 Path(self.folder).parent)  # fmt: skip
        return jobs


def outcome(job: Any) -> str | None:
    """Wait for a job; what went wrong outside of its work, if anything did."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        returned = [result for result in job.results() if result.status != JobStatus.COMPLETED]
    except FailedJobError as error:
        return str(error).strip()
    except UncompletedJobError:
        return f"Slurm says {job.state}"
    return str(returned[0]._return_value) if returned else None
