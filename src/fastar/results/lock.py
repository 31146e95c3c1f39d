"""One process per run folder: a lock file made by exclusive create, which says who holds it."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fastar.interruption import slurm_job

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PARTS = "lock.*.part"
START_TIME_FIELD = 21  # of /proc/<pid>/stat, counted from 0: clock ticks since boot


class RunLocked(RuntimeError):
    """Another process is working on this run."""


class RunLock:
    """The file `lock` in a folder. Held from `acquire` to `release`.

    A lock whose holder cannot be alive any more is taken over: same host with another boot, or a process id that is
    gone or was given to a younger process, or an earlier start of the same requeued Slurm job, or a Slurm job that
    Slurm does not run any more (a node that was lost). Whether any other process on another host lives cannot be
    known, so that is left to a person. No clock is read, so none can be wrong.
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
            if is_cut_off(self.path) or (holder is not None and is_stale(holder)):
                self.path.unlink(missing_ok=True)
            if not self._create():
                raise RunLocked(self._refusal())
        finally:
            os.close(folder)

    def release(self) -> None:
        """Give the lock back; does nothing if it is not held."""
        if self.held:
            holder, me = self.holder(), this_process()
            if holder is not None and all(
                holder[key] == me[key] for key in ("host", "boot", "pid", "process_start")
            ):
                self.path.unlink(missing_ok=True)
            self.held = False

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock; None if nobody does or the file cannot be read."""
        with suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            found = json.loads(self.path.read_text())
            if isinstance(found, dict) and {"host", "boot", "pid", "process_start"} <= found.keys():
                return found
        return None

    def _create(self) -> bool:
        # The file appears with its content, or not at all: a process may be killed at any moment.
        part = self.path.with_name(f"lock.{uuid.uuid4().hex}.part")
        try:
            with part.open("w") as file:
                json.dump(this_process(), file)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves an empty lock
            os.link(part, self.path)
        except (FileExistsError, FileNotFoundError):  # not found: the holder has swept our part away
            return False
        finally:
            part.unlink(missing_ok=True)
        self.held = True
        for left in self.path.parent.glob(PARTS):  # of processes that were killed right there
            left.unlink(missing_ok=True)
        return True

    def _refusal(self) -> str:
        holder = self.holder()
        if holder is None:
            return f"{self.path} exists but does not say who holds it: if no process works on this run, remove the file"
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        return (
            f"{self.path.parent.name} is being worked on by process {holder['pid']} on host {holder['host']}{job} "
            f"since {holder.get('since')}: wait for it, or remove {self.path} if that process is gone"
        )


def is_cut_off(path: Path) -> bool:
    """Whether a lock is no JSON. They appear whole, so a power cut did that, and the holder is gone."""
    try:
        json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True
    except FileNotFoundError:
        pass
    return False


def this_process() -> dict[str, Any]:
    """What identifies this process among all hosts, boots and containers."""
    return {
        "host": socket.gethostname(),
        "boot": BOOT_ID.read_text().strip() if BOOT_ID.exists() else None,
        "pid": os.getpid(),
        "pid_namespace": os.readlink(PID_NAMESPACE) if PID_NAMESPACE.exists() else None,
        "process_start": start_of(os.getpid()),
        "job": slurm_job(),
        "job_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def start_of(pid: int) -> float:
    """When a process began: clock ticks since boot, which no change of the clock touches; seconds outside of Linux.

    Raises:
        psutil.NoSuchProcess: there is no such process, or it is a zombie.
    """
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():
        return float(psutil.Process(pid).create_time())
    try:
        fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold anything
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    if fields[0] in ("Z", "X"):
        raise psutil.NoSuchProcess(pid)
    return float(fields[START_TIME_FIELD - 2])


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
        return holder.get("job") is not None and is_over(str(holder["job"]))
    if holder.get("boot") != me["boot"]:
        return True
    if holder.get("pid_namespace") != me["pid_namespace"]:
        return False  # another container on this machine: its process ids mean nothing here
    try:
        return start_of(int(holder["pid"])) != float(holder["process_start"])
    except psutil.NoSuchProcess:
        return True


def is_over(job: str) -> bool:
    """Whether Slurm says that it does not run this job any more; False if it cannot be asked."""
    if shutil.which("squeue") is None:
        return False
    answer = subprocess.run(
        ["squeue", "--noheader", "--jobs", job, "--states", "all", "--format", "%T"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if answer.returncode != 0:  # a job that ended a while ago is not known any more
        return "Invalid job id" in answer.stderr
    states = set(answer.stdout.split())
    return not states & {
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "CONFIGURING",
        "SIGNALING",
        "STAGE_OUT",
    }
