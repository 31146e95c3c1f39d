"""Being asked to stop: SIGTERM, SIGUSR1 and SIGUSR2 let the work reach a safe point, save, and go back to the queue.

    with listening():
        for chunk in ...:
            if requested():
                save()
            check()  # raises Interrupted

Slurm sends such a signal some time before it takes a node away: before the time limit (`--signal`), at it, or when a
job of higher priority comes; slurm/README.md says who gets which. SIGTERM is what everybody else sends. Ctrl-C is not
among them: it stops at once.
"""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

INTERRUPTED = "interrupted: the same command goes on where this one stopped"
"""What Ctrl-C ends with."""

_received: signal.Signals | None = None
_earlier: dict[signal.Signals, Any] = {}


class Interrupted(SystemExit):
    """The work was asked to stop and has saved what it needs to go on; ends the process if nobody catches it."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(128 + received)
        self.received = received

    def __str__(self) -> str:
        return f"stopped by {self.received.name}: the same command goes on where this one stopped"


@contextmanager
def listening() -> Iterator[None]:
    """Catch `SIGNALS` in the block; does nothing in a thread other than the main one, or inside another `listening`."""
    global _received
    if threading.current_thread() is not threading.main_thread() or _earlier:
        yield
        return
    _received = None
    _earlier.update({number: signal.signal(number, _receive) for number in SIGNALS})
    try:
        yield
    finally:
        for number, handler in _earlier.items():
            signal.signal(number, handler)
        _earlier.clear()
        _received = None


def requested() -> bool:
    """Whether a signal has come since `listening` began."""
    return _received is not None


def check() -> None:
    """Raise `Interrupted` if a signal has come: call it where everything is saved."""
    if _received is not None:
        raise Interrupted(_received)


def requeue() -> str:
    """Put this Slurm job back into the queue, if it is one that was not cancelled; says what was done.

    A job of submitit's is put back by submitit, which counts how often. Call it last, inside `listening`: it may end
    the process.
    """
    job = slurm_job()
    if job is None:
        return "not a Slurm job: start the same command again"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return "left to the first task of this job"
    if shutil.which("scontrol") is None:
        return "there is no scontrol here (in this container?): submit the job again"
    try:
        if is_cancelled(description := _scontrol("-o", "show", "job", job)):
            return f"Slurm job {job} was cancelled and stays so"
        if _field(description, "JobState") == "PENDING":  # preemption does it itself
            return f"Slurm has put job {job} back into the queue"
        handler = _submitit_handler()
        if handler is not None:
            logger.info("back to the queue through submitit")
            handler(_received or signal.SIGUSR2, None)  # ends the process
        _scontrol("requeue", job)
    except subprocess.CalledProcessError as error:
        return f"Slurm did not take job {job} back ({str(error.stderr).strip()}): submit it again"
    except subprocess.TimeoutExpired:
        return f"Slurm did not answer, so job {job} is not back in the queue: submit it again"
    return f"Slurm job {job} was put back into the queue"


def slurm_job() -> str | None:
    """How Slurm calls the job that this process is in, as in 12 or 12_3; None outside of Slurm."""
    # The number alone would not do: the last task of an array carries that of the whole array.
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"


def is_cancelled(description: str) -> bool:
    """Whether somebody wants this job gone, from what `scontrol -o show job` says while it is being ended.

    Slurm would put it back into the queue all the same. It shows a job whose processes still live as COMPLETING,
    whatever ends it; the reason tells: TimeLimit for a time limit, None for scancel. (A job that is preempted is
    RUNNING in its grace time and PENDING after it; a batch script that died of a signal has JobLaunchFailure.)
    """
    state, reason = _field(description, "JobState"), _field(description, "Reason")
    return state == "CANCELLED" or (state == "COMPLETING" and reason == "None")


def _field(description: str, name: str) -> str:
    return next((word[len(name) + 1 :] for word in description.split() if word.startswith(f"{name}=")), "")


def _scontrol(*arguments: str) -> str:
    """Its output; there are seconds before SIGKILL, so a silent controller is given few of them."""
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    # a plain write: the handler may interrupt a log call that holds the log's lock
    os.write(2, f"{_received.name}: stopping at the next safe point\n".encode())


def _submitit_handler() -> Callable[..., Any] | None:
    """What submitit would have done on its own signal; None outside of its jobs."""
    for handler in (*_earlier.values(), *map(signal.getsignal, SIGNALS)):
        if getattr(handler, "__name__", "") == "checkpoint_and_try_requeue":
            found: Callable[..., Any] = handler
            return found
    return None
