"""`launcher=processes`: Hydra's joblib launcher, with a GPU for each process, and a sweep that outlives its workers."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fastar.interruption import INTERRUPTED, SIGNALS, Interrupted, requeue
from fastar.results.logtail import sentence_of
from fastar.sweep.devices import GPUS, LAUNCHER, PER_GPU, visible_gpus
from fastar.sweep.job import job_return
from fastar.sweep.records import JOBS, job_key, read_record
from fastar.sweep.status import bury_dead

log = logging.getLogger(__name__)

MOST_HITS = 2  # then a job is done by itself
SETTLE_SECONDS = 2


class ProcessesLauncher(Launcher):
    """Several processes on this machine.

    Args:
        n_jobs: how many at a time; -1 for `per_gpu` a GPU, or, where there are none, one a core.
        per_gpu: processes that share a GPU.
        joblib: further settings of `joblib.Parallel`.
    """

    def __init__(self, *, n_jobs: int = -1, per_gpu: int = 1, **joblib: Any) -> None:
        self.n_jobs, self.per_gpu, self.joblib = n_jobs, per_gpu, joblib

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs. If a worker is killed, joblib ends all others, too: what they did goes on in new ones.

        Which of them was meant is not known, so a job that was hit twice is done by itself, and given
        up if it is hit again.
        """
        try:
            from hydra_plugins.hydra_joblib_launcher import _core
            from joblib.externals.loky.process_executor import TerminatedWorkerError
        except ImportError as error:
            raise SystemExit(
                "error: launcher=processes needs Hydra's joblib launcher: pip install -e '.[launchers]'"
            ) from error
        gpus = visible_gpus()
        if self.n_jobs == -1:
            self.joblib["n_jobs"] = len(gpus) * self.per_gpu or len(os.sched_getaffinity(0))
        else:
            self.joblib["n_jobs"] = self.n_jobs
        os.environ |= {LAUNCHER: str(os.getpid()), GPUS: ",".join(gpus), PER_GPU: str(self.per_gpu)}
        experiment = Path(str(self.config.paths.outputs)) / str(self.config.name)
        todo, hits = list(job_overrides), Counter[str]()
        while todo:
            batch = [overrides for overrides in todo if hits[job_key(overrides)] < MOST_HITS] or todo[:1]
            try:
                with signals_forwarded():
                    _core.launch(launcher=self, job_overrides=batch, initial_job_idx=initial_job_idx)
                todo = [overrides for overrides in todo if overrides not in batch]
            except TerminatedWorkerError as error:
                time.sleep(SETTLE_SECONDS)  # until the last of them is gone
                bury_dead(experiment)
                hit = [overrides for overrides in batch if was_killed(experiment, overrides)]
                if not hit:
                    raise
                hits.update(job_key(overrides) for overrides in hit)
                again = [] if len(batch) == 1 else hit
                todo = [
                    overrides for overrides in todo
                    if overrides not in batch or overrides in again or is_waiting(experiment, overrides)
                ]  # fmt: skip
                log.error("a worker process was killed (%s): %d jobs go on", sentence_of(error), len(todo))
        return [job_return(overrides) for overrides in job_overrides]


def was_killed(experiment: Path, overrides: Sequence[str]) -> bool:
    """Whether a job's process ended without a word."""
    record = read_record(experiment / JOBS / job_key(overrides))
    return record is not None and (record.failure or {}).get("kind") == "killed"


def is_waiting(experiment: Path, overrides: Sequence[str]) -> bool:
    """Whether a job has still to be begun."""
    record = read_record(experiment / JOBS / job_key(overrides))
    return record is not None and record.status == "waiting"


@contextmanager
def signals_forwarded() -> Iterator[None]:
    """Signals to stop go on to the workers, which save and end; then this process does, back to the queue if any.

    A terminal sends Ctrl-C to the workers as well, other senders do not: it goes on as SIGTERM. A second one
    stops at once.
    """
    received: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                # joblib's own process, which must outlive the workers
                if "resource_tracker" not in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    earlier = {number: signal.signal(number, forward) for number in (*SIGNALS, signal.SIGINT)}
    try:
        yield
    except BaseException:
        if signal.SIGINT in received:
            raise SystemExit(INTERRUPTED) from None
        if received:
            log.warning("%s", requeue())
            raise Interrupted(received[0]) from None
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
