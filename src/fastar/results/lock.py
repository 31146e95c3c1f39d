"""One process per run folder: a lock file made by exclusive create, which says who holds it."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


class RunLocked(RuntimeError):
    """Another process is working on this run."""


class RunLock:
    """The file `lock` in a run's folder. Held from `acquire` to `release`.

    A lock whose holder cannot be alive any more is taken over: same host with another boot, or a process id that is
    gone or was given to a younger process, or an earlier start of the same requeued Slurm job. Whether a process on
    another host lives cannot be known, so that is left to a person.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.held = False

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunLocked: somebody else has it; the message says who and what to do.
        """
        if self._create():
            return
        # Take-overs of one folder are serialised, so that what is removed is surely the lock that was found stale.
        # Only processes of the holder's own host get past `is_stale`, and for those flock is reliable.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            holder = self.holder()
            if holder is not None and is_stale(holder):
                self.path.unlink(missing_ok=True)
            if not self._create():
                raise RunLocked(self._refusal())
        finally:
            os.close(folder)

    def release(self) -> None:
        """Give the lock back; does nothing if it is not held."""
        if self.held:
            self.path.unlink(missing_ok=True)
            self.held = False

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock; None if nobody does or the file cannot be read (it is being written)."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            found = json.loads(self.path.read_text())
            if isinstance(found, dict) and {"host", "boot", "pid", "process_start"} <= found.keys():
                return found
        return None

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(this_process(), file)
        self.held = True
        return True

    def _refusal(self) -> str:
        holder = self.holder()
        if holder is None:
            return f"{self.path} exists but does not say who holds it: if no process works on this run, remove the file"
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        return (
            f"run {self.path.parent.name} is being worked on by process {holder['pid']} on host {holder['host']}{job} "
            f"since {holder.get('since')}: wait for it, or remove {self.path} if that process is gone"
        )


def this_process() -> dict[str, Any]:
    """What identifies this process among all hosts, boots and containers."""
    return {
        "host": socket.gethostname(),
        "boot": BOOT_ID.read_text().strip() if BOOT_ID.exists() else str(int(psutil.boot_time())),
        "pid": os.getpid(),
        "pid_namespace": os.readlink(PID_NAMESPACE) if PID_NAMESPACE.exists() else None,
        "process_start": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "job_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_stale(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote `holder` is certainly gone."""
    me = this_process()
    if (
        me["job"] is not None
        and holder.get("job") == me["job"]
        and holder.get("job_restart", 0) < me["job_restart"]
    ):
        return True  # Slurm requeues a job only after its earlier start has ended
    if holder.get("host") != me["host"]:
        return False
    if holder.get("boot") != me["boot"]:
        return True
    if holder.get("pid_namespace") != me["pid_namespace"]:
        return False  # another container on this machine: its process ids mean nothing here
    try:
        start = psutil.Process(int(holder["pid"])).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(start - float(holder["process_start"])) > 1.0
