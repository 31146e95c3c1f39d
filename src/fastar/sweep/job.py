"""Around the work of one job, in whatever way it was started: errors, signals, its record."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig

from fastar.compare.command import CAN_BE_PUT_RIGHT
from fastar.interruption import INTERRUPTED, Interrupted, listening, requeue, slurm_job
from fastar.results.files import unwritable
from fastar.results.logtail import sentence_of, unwrapped
from fastar.sweep.devices import await_other_workers, claim_gpu, is_worker
from fastar.sweep.records import JobRecord, record_of, take

log = logging.getLogger(__name__)


Work = Callable[[DictConfig, JobRecord | None], None]
"""What a job does with its config, and its record unless another process does the same job at this moment."""


def run_job(config: DictConfig, program: str, work: Work) -> None:
    """Do `work`.

    An error ends a single command with one sentence. In a sweep it is recorded, told, and the sweep goes on. If the
    process is asked to stop, the job goes back to Slurm's queue, if that is where it came from.
    """
    hydra = HydraConfig.get()
    sweeping = hydra.mode == RunMode.MULTIRUN
    with listening():
        claim_gpu()
        experiment = Path(config.paths.outputs) / config.name
        record = record_of(experiment, program, list(hydra.overrides.task))
        try:
            lock = take(record, slurm_job())
        except OSError as error:
            raise SystemExit(f"error: {unwritable(experiment, error)}") from error
        status = "failed"
        try:
            work(config, record if lock is not None else None)
            status = "done"
        except Interrupted as error:
            status = "interrupted"
            log.warning("%s", error)
            raise
        except KeyboardInterrupt as error:
            status = "interrupted"
            raise SystemExit(INTERRUPTED) from error
        except Exception as error:
            record.fail(error)
            told = isinstance(unwrapped(error), CAN_BE_PUT_RIGHT)
            if not sweeping and told:
                raise SystemExit(f"error: {sentence_of(error)}") from error
            if not sweeping:
                raise
            log.error("%s: %s", " ".join(record.overrides), sentence_of(error), exc_info=not told)
        finally:
            if lock is not None:
                record.status = status
                try:
                    record.save()
                except OSError as error:  # the disk is full, say: the runs know what came of them
                    log.warning("%s", unwritable(record.folder, error))
                finally:
                    lock.release()
            if status == "interrupted" and is_worker():
                await_other_workers(experiment)
            elif status == "interrupted":
                log.warning("%s", requeue())


def job_return(overrides: Sequence[str]) -> JobReturn:
    """What Hydra wants from a launcher for each job; what came of the job says its record."""
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned
