"""One GPU for each worker process of `launcher=processes`."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from fastar.results.launch import launch_id
from fastar.results.lock import RunLock, is_stale
from fastar.sweep.records import JOBS

GPUS, PER_GPU = "FASTAR_GPUS", "FASTAR_PROCESSES_PER_GPU"
LAUNCHER = "FASTAR_LAUNCHER_PID"

_claimed: list[int] = []  # descriptors of this process; their locks go with it, however it ends


def is_worker() -> bool:
    """Whether `launcher=processes` has started this process."""
    return os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())


def await_other_workers(experiment: Path, *, seconds: float = 300) -> None:
    """In a worker process that is about to end, wait for those beside it that are still at a job of `experiment`.

    The first one that ends makes joblib end all, in the middle of what they are saving.
    """
    launcher, deadline = int(os.environ[LAUNCHER]), time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            beside = {child.pid for child in psutil.Process(launcher).children()} - {os.getpid()}
        except psutil.NoSuchProcess:  # nobody is left to end the others
            return
        holders = [RunLock(path.parent).holder() for path in experiment.glob(f"{JOBS}/*/lock")]
        if not any(holder["pid"] in beside and not is_stale(holder) for holder in holders if holder):
            return
        time.sleep(0.1)


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Does not start CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    listed = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [str(number) for number, line in enumerate(listed) if line.startswith("GPU ")]


def claim_gpu() -> str | None:
    """In a worker process, take one of the GPUs that the launcher gives out, for good; None where it gives none.

    Raises:
        ValueError: all of them are taken.
    """
    gpus = [name for name in os.environ.get(GPUS, "").split(",") if name]
    if not gpus or not is_worker():
        return None
    if _claimed:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    folder = Path(tempfile.gettempdir()) / f"fastar-{os.getuid()}-{launch_id()}"
    folder.mkdir(exist_ok=True)
    for turn in range(int(os.environ.get(PER_GPU, "1"))):  # each GPU once before any is taken twice
        for gpu in gpus:
            descriptor = os.open(folder / f"gpu-{gpu.replace('/', '_')}-{turn}", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            _claimed.append(descriptor)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return gpu
    raise ValueError(f"all {len(gpus)} GPUs are taken: lower launcher.processes, or raise launcher.per_gpu")
