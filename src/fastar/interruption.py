"""Being asked to stop: SIGTERM, SIGUSR1 and SIGUSR2 let the work reach a safe point, save, and go back to the queue.

    with listening():
        for chunk in ...:
            if requested():
                save()
            check()  # raises Interrupted

Slurm sends such a signal some time before it takes a node away: before the time limit (`--signal`), or when a job of
higher priority comes. SIGTERM is what everybody else sends. Ctrl-C is not among them: it stops at once.
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
    """Put this Slurm job back into the queue, if it is one; says what was done.

    A job of submitit's is put back by submitit, which counts how often. Call it last, inside `listening`: it may end
    the process.
    """
    handler = _submitit_handler()
    if handler is not None:
        logger.info("back to the queue through submitit")
        handler(_received, None)  # ends the process
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a Slurm job: start the same command again"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return "left to the first task of this job"
    if shutil.which("scontrol") is None:
        return "there is no scontrol on this node: submit the job again"
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return f"Slurm job {job} was put back into the queue"
    return f"Slurm did not take job {job} back ({answer.stderr.strip()}): submit it again"


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    # a plain write: the handler may interrupt a log call that holds the log's lock
    os.write(2, f"{_received.name}: stopping at the next safe point\n".encode())


def _submitit_handler() -> Callable[..., Any] | None:
    """What submitit would have done on its own signal; None outside of its jobs."""
    for handler in _earlier.values():
        if getattr(handler, "__name__", "") == "checkpoint_and_try_requeue":
            found: Callable[..., Any] = handler
            return found
    return None
