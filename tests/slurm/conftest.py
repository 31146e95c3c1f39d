"""A real Slurm for the tests, started by slurm/one_node/up.sh: one for each process of pytest, on ports of its own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_NODE = REPOSITORY / "slurm/one_node"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PORTS = 5


def why_not() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "starting a Slurm needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm is not installed here: {', '.join(missing)} missing" if missing else None


def free_ports(first: int, last: int) -> int:
    """The first of `PORTS` ports in a row that nobody listens on."""
    for start in range(first, last, PORTS):
        sockets = []
        try:
            for port in range(start, start + PORTS):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return start
        except OSError:
            continue
        finally:
            for held in sockets:
                held.close()
    raise RuntimeError(f"no {PORTS} free ports in a row between {first} and {last}")


@dataclass
class Cluster:
    """A running cluster; `environment` is that of a person who works on it."""

    root: Path
    environment: dict[str, str]
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, *line: str | Path, folder: Path = REPOSITORY) -> "subprocess.Popen[str]":
        """A command that is not waited for."""
        return subprocess.Popen(
            line,
            cwd=folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *line: str | Path, folder: Path = REPOSITORY) -> str:
        """What a command prints; it has to succeed."""
        done = subprocess.run(
            line, cwd=folder, env=self.environment, text=True, capture_output=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """sbatch; the number of the job."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def states(self, job: str) -> list[str]:
        """Of a job or of the tasks of an array, in order, as squeue knows them: also after they ended."""
        shown = self.run("squeue", "--noheader", "--array", "--states=all", "--jobs", job, "--format=%K %T")
        tasks = sorted(line.split() for line in shown.splitlines())
        return [state for _, state in sorted(tasks, key=lambda task: int(task[0]) if task[0] != "N/A" else 0)]

    def array_of(self, sweep: "subprocess.Popen[str]", name: str) -> str:
        """The number of the job or array that a launcher submits under this name."""
        while not (found := self.run("squeue", "-h", "--name", name, "-o", "%F").split()):
            assert sweep.poll() is None, sweep.communicate()[0]
            time.sleep(0.2)
        return found[0]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # not pytest's own folder, which other users (munge, mysql) cannot enter, and short, for the sockets
    root = Path(tempfile.mkdtemp(prefix="fastar-slurm-"))
    root.chmod(0o755)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    port = free_ports(21000 + 200 * worker, 21200 + 200 * worker)
    options = ["--cpus", "8", "--gpus", "2", "--kill-wait", "20", "--port", str(port)]
    try:
        up = subprocess.run(
            [ONE_NODE / "up.sh", root, *options], capture_output=True, text=True, check=False, timeout=100
        )
        assert up.returncode == 0, up.stdout + up.stderr
        running = Cluster(root, person(root))
        yield running
        for process in running.started:
            process.kill()
    finally:
        subprocess.run([ONE_NODE / "down.sh", root], check=False, timeout=100)
        shutil.rmtree(root, ignore_errors=True)


def person(root: Path) -> dict[str, str]:
    """The environment of somebody who has activated this Python's environment and works on the cluster."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PYTEST", "FASTAR"))
    }
    return inherited | {
        "SLURM_CONF": str(root / "etc/slurm.conf"),
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
        "OMP_NUM_THREADS": "1",
    }


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Until the condition holds; the test fails if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.2)


def lines_of(path: Path) -> Sequence[str]:
    return path.read_text().splitlines() if path.exists() else []
