"""How runs fail: which errors are a lack of memory, and runs whose process has ended without a word."""

from datetime import UTC, datetime
from pathlib import Path

from fastar.results.files import SUMMARY, read_summary, write_json
from fastar.results.lock import RunLock, RunLocked, is_stale
from fastar.results.logtail import last_lines


def bury(folder: Path) -> bool:
    """Mark a run whose process is certainly gone without a word as failed, with its last log lines; whether it was one.

    What it has made is kept: the next process that opens the run goes on from there.
    """
    lock = RunLock(folder)
    holder, summary = lock.holder(), read_summary(folder)
    if summary is None or summary["status"] != "running" or holder is None or not is_stale(holder):
        return False
    try:
        lock.acquire()
    except RunLocked:  # somebody else was faster
        return False
    try:
        summary = read_summary(folder)
        if summary is None or summary["status"] != "running":
            return False
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        summary["status"], summary["finished"] = "failed", datetime.now(UTC).isoformat(timespec="seconds")
        summary["failure"] = {
            "kind": "killed",
            "reason": f"its process ended without a word{job}: killed, out of memory, or the node was lost",
            "where": None,
            "log": last_lines(folder),
        }
        write_json(folder / SUMMARY, summary)
    finally:
        lock.release()
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    import torch  # a look at a sweep's status need not wait for it

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
