"""What happens to a sweep when things go wrong: kills, a full disk, a read-only folder, a jumping clock, two at once.

    python scripts/robustness.py --kills 20

Each trial runs a small real sweep (the tiny backbone; dense, window and TempCache; protocols A, B and C; two seeds) in
processes of their own, disturbs it, lets the same command finish it, and compares every number with those of a sweep
that was left alone. Linux; the disk and folder trials need root (they mount a small tmpfs). One JSON line a trial.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from fastar.results import load, load_runs

ROOT = Path(__file__).resolve().parent.parent
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
LAUNCHERS = ("local", "processes")
TIMED = "_s$|fps|latency|peak|speedup"
KEYS = ["run_id", "metric", "chunk", "frame", "clip"]


def command(outputs: Path, launcher: str = "local", *overrides: str) -> list[str]:
    """The sweep: two jobs of nine runs each."""
    small = [
        "debug=tiny",
        "source=heldout",
        "prefill_frames=16",
        "metrics=fast",
        "videos=0",
        "save_every=2",
        "frames=32",
        "name=sweep",
    ]
    work = ["method=[dense,window,tempcache]", "protocols=[A,B,C]", "seeds=[0],[1]", f"launcher={launcher}"]
    return [
        sys.executable,
        str(ROOT / "experiments/compare.py"),
        "-m",
        *small,
        *work,
        f"paths.outputs={outputs}",
        *overrides,
    ]


def start(line: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, as a shell would start it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as file:
        return subprocess.Popen(line, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish(line: list[str], log: Path, **variables: str) -> int:
    """Run a command to its end; its exit status."""
    return start(line, log, **variables).wait()


def numbers(outputs: Path) -> pd.DataFrame:
    """Everything that was measured but times, in one order."""
    rows = load(outputs / "sweep").drop(columns=["time", "experiment"])
    return rows[~rows["metric"].str.contains(TIMED)].sort_values(KEYS).reset_index(drop=True)


def same_numbers(outputs: Path, wanted: pd.DataFrame) -> bool:
    """Whether a sweep is complete and equal to one that was left alone, bit by bit."""
    found = numbers(outputs)
    return bool(found.equals(wanted)) and set(load_runs(outputs / "sweep")["status"]) == {"done"}


def finished_tables(outputs: Path) -> dict[str, tuple[int, int]]:
    """Complete tables by run, with what changes if one is written again."""
    done = {}
    for summary in outputs.glob("sweep/*/summary.json"):
        if json.loads(summary.read_text())["status"] == "done":
            table = (summary.parent / "metrics.parquet").stat()
            done[summary.parent.name] = (table.st_ino, table.st_mtime_ns)
    return done


def kill_trial(folder: Path, wanted: pd.DataFrame, kills: int, seed: int, longest: float) -> dict[str, Any]:
    """SIGKILL to all processes of the sweep at random moments; after each, everything on disk is read.

    redone: complete tables that were written again. lost: complete tables that are gone, or sweeps with other numbers.
    """
    generator, log = random.Random(seed), folder / "log"
    before: dict[str, tuple[int, int]] = {}
    done_at_kill: list[int] = []
    redone = lost = unreadable = completed = 0
    while len(done_at_kill) < kills:
        process = start(command(folder, LAUNCHERS[len(done_at_kill) % len(LAUNCHERS)]), log)
        try:
            process.wait(generator.uniform(2.0, longest))
            killed = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed = True
        if not killed or len(finished_tables(folder)) == wanted["run_id"].nunique():
            completed += 1  # nothing was left to disturb, which does not count: begin another sweep
            lost += not same_numbers(folder, wanted)
            shutil.rmtree(folder / "sweep")
            before = {}
            continue
        after = finished_tables(folder)
        redone += sum(after.get(run) != state for run, state in before.items() if run in after)
        lost += len(before.keys() - after.keys())
        before = after
        done_at_kill.append(len(after))
        if list(folder.glob("sweep/*/summary.json")):
            try:
                load(folder / "sweep", partial=True)
            except ValueError:
                unreadable += 1
    status = finish(command(folder), log)
    after = finished_tables(folder)
    redone += sum(after.get(run) != state for run, state in before.items())
    left = [path.name for path in folder.rglob("*.part")] + [path.name for path in folder.rglob("lock")]
    return {
        "kills": kills, "redone": redone, "lost": lost, "unreadable": unreadable, "runs_done_at_kill": done_at_kill,
        "sweeps_completed_on_the_way": completed, "exit_status_of_the_last": status, "files_left_over": left,
        "same_numbers": same_numbers(folder, wanted),
    }  # fmt: skip


def full_disk(folder: Path, wanted: pd.DataFrame) -> dict[str, Any]:
    """A disk of 1.6 MiB fills in mid-sweep; after room was made the same command goes on."""
    return on_a_disk(folder, wanted, first="size=1600k", then="size=200m")


def read_only(folder: Path, wanted: pd.DataFrame) -> dict[str, Any]:
    """The output folder cannot be written to; once it can, the same command does everything."""
    return on_a_disk(folder, wanted, first="size=200m,ro", then="rw")


def on_a_disk(folder: Path, wanted: pd.DataFrame, *, first: str, then: str) -> dict[str, Any]:
    """The sweep on a tmpfs mounted with the options `first`, and once more when it is remounted with `then`."""
    disk, log = folder / "disk", folder / "log"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", first, "tmpfs", str(disk)], check=True)
    try:
        statuses, done = [finish(command(disk), log)], len(finished_tables(disk))
        text = log.read_text(errors="replace")
        said = [line.replace(str(folder), "") for line in text.splitlines() if "cannot write" in line]
        subprocess.run(["mount", "-o", f"remount,{then}", str(disk)], check=True)
        statuses.append(finish(command(disk), log))
        return {
            "exit_statuses": statuses, "said": said[-1] if said else None, "traceback": "Traceback" in text,
            "runs_done_when_refused": done, "same_numbers": same_numbers(disk, wanted),
        }  # fmt: skip
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def clock_jump(folder: Path, wanted: pd.DataFrame) -> dict[str, Any]:
    """The clock jumps by a day, ahead and back, under a sweep; then another process meets its locks a day later."""
    if FAKETIME is None:
        return {"skipped": "libfaketime is not installed"}
    offset, log = folder / "offset", folder / "log"
    offset.write_text("+0")
    variables = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    first = start(command(folder, "local", "seeds=[0]"), log, **variables)
    wait_for(lambda: bool(list(folder.glob("sweep/*/lock"))), first)
    offset.write_text("+1d")
    time.sleep(1)
    second = start(command(folder), folder / "second.log")  # with the right clock, while the first one works
    time.sleep(3)
    offset.write_text("-1d")
    statuses = [first.wait(), second.wait()]
    starts = {
        path.parent.name: json.loads(path.read_text())["starts"]
        for path in folder.glob("sweep/*/summary.json")
    }
    return {
        "exit_statuses": statuses, "most_starts_of_a_run": max(starts.values()),
        "same_numbers": same_numbers(folder, wanted),
    }  # fmt: skip


def two_at_once(folder: Path, wanted: pd.DataFrame) -> dict[str, Any]:
    """The same sweep twice on one folder at the same moment, with both launchers."""
    processes = [start(command(folder, launcher), folder / f"{launcher}.log") for launcher in LAUNCHERS]
    statuses = [process.wait() for process in processes]
    starts = {
        path.parent.name: json.loads(path.read_text())["starts"]
        for path in folder.glob("sweep/*/summary.json")
    }
    waited = sum(
        "waiting for runs" in (folder / f"{name}.log").read_text(errors="replace") for name in LAUNCHERS
    )
    return {
        "exit_statuses": statuses, "runs": len(starts), "most_starts_of_a_run": max(starts.values()),
        "sweeps_that_waited": waited, "same_numbers": same_numbers(folder, wanted),
    }  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it holds; an error if the process ends before."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError("the sweep ended before anything could be tried: raise its frames")
        time.sleep(0.05)


def main() -> None:
    """Run the trials named on the command line."""
    trials = {
        "full_disk": full_disk,
        "read_only": read_only,
        "clock_jump": clock_jump,
        "two_at_once": two_at_once,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", nargs="*", default=["kill", *trials], choices=["kill", *trials])
    parser.add_argument("--kills", type=int, default=20, help="random moments of the kill trial")
    parser.add_argument(
        "--longest", type=float, default=0.0, help="seconds before a kill; 0: as long as the sweep takes"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        begun = time.perf_counter()
        if finish(command(whole), whole / "log"):
            sys.exit(f"the sweep that was left alone failed:\n{(whole / 'log').read_text()}")
        seconds = time.perf_counter() - begun
        wanted = numbers(whole)
        print(
            json.dumps(
                {"trial": "left alone", "seconds": round(seconds, 1), "runs": wanted["run_id"].nunique()}
            ),
            flush=True,
        )
        for name in options.trials:
            folder = Path(scratch) / name
            folder.mkdir()
            if name == "kill":
                found = kill_trial(folder, wanted, options.kills, options.seed, options.longest or seconds)
            else:
                found = trials[name](folder, wanted)
            print(json.dumps({"trial": name, **found}), flush=True)


if __name__ == "__main__":
    main()
