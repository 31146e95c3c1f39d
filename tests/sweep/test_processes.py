"""launcher=processes: jobs side by side, a GPU each; killed workers and signals do not cost the sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastar.results import load, load_runs
from fastar.sweep import devices

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["debug=tiny", "source=heldout", "prefill_frames=16", "metrics=fast", "videos=0", "name=sweep"]


def start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    """A sweep with two processes on this machine."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("FASTAR_LAUNCH", None)
    line = [sys.executable, str(ROOT / "experiments/compare.py"), "-m", *SMALL, f"paths.outputs={tmp_path}"]
    line += ["launcher=processes", "launcher.processes=2", *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_costs_its_own_job_only(tmp_path: Path) -> None:
    targets = "fastar.cache.WindowCache,tests.sweep.killer.killed"
    sweep = start(
        tmp_path, "method=[dense,window]", "protocols=[B]", "frames=8", "seeds=[0],[1]",
        f"methods.window.cache._target_={targets}",
    )  # fmt: skip
    said = sweep.communicate()[0]
    assert sweep.returncode == 1, said
    assert "a worker process was killed" in said and "4 jobs: 2 done, 2 failed" in said
    assert "Traceback" not in said
    runs = load_runs(tmp_path / "sweep")
    states = runs.groupby(["protocol", "method", "status"]).size().to_dict()
    assert states == {
        ("B", "dense", "done"): 2, ("C", "dense", "done"): 2, ("B", "window", "done"): 2, ("B", "window", "failed"): 2,
    }  # fmt: skip
    assert runs.loc[runs["status"] == "failed", "kind"].tolist() == ["killed"] * 2
    assert (tmp_path / "sweep/report/results.md").exists()
    assert not list(tmp_path.rglob("lock")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_sweep_reaches_the_workers_which_save(tmp_path: Path, sent: signal.Signals) -> None:
    """SIGTERM to the sweep alone; Ctrl-C as a terminal sends it, to all processes."""
    work = ["method=[dense,window]", "protocols=[C]", "frames=1600", "save_every=1000", "seeds=[0],[1]"]
    sweep = start(tmp_path, *work)
    while len(list(tmp_path.glob("sweep/*/lock"))) < 2:
        time.sleep(0.2)
        assert sweep.poll() is None
    time.sleep(2)
    if sent == signal.SIGINT:
        os.killpg(sweep.pid, sent)
    else:
        sweep.send_signal(sent)
    said = sweep.communicate()[0]
    if sent == signal.SIGINT:
        assert sweep.returncode == 1 and "the same command goes on where this one stopped" in said, said
    else:
        assert sweep.returncode == 128 + signal.SIGTERM, said
        assert "stopping at the next safe point" in said and "start the same command again" in said
    assert "Traceback" not in said, said
    states = [json.loads(path.read_text())["status"] for path in tmp_path.glob("sweep/*/summary.json")]
    assert "running" in states and not list(tmp_path.glob("sweep/*/lock"))
    kept = list(tmp_path.glob("sweep/*/state.pt"))
    assert kept or sent == signal.SIGINT, "saved though it was not yet time"
    assert load(tmp_path / "sweep", partial=True)["chunk"].max() < 399


def test_every_worker_takes_a_gpu_of_its_own(tmp_path: Path) -> None:
    """Three processes on two GPUs with two each; a fifth is refused."""
    code = (
        "import os, sys, time; from fastar.sweep.devices import claim_gpu\n"
        "try:\n    print(claim_gpu(), os.environ['CUDA_VISIBLE_DEVICES'], claim_gpu(), flush=True)\n"
        "except ValueError as error:\n    print(error, flush=True)\n"
        "sys.stdin.read()"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path), devices.GPUS: "3,5",
        devices.PER_GPU: "2", devices.LAUNCHER: "1", "FASTAR_LAUNCH": "test",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(5)
    ]
    said = [worker.stdout.readline().strip() for worker in workers if worker.stdout]
    assert sorted(said)[:4] == ["3 3 3", "3 3 3", "5 5 5", "5 5 5"]
    assert sorted(said)[4].startswith("all 2 GPUs are taken: lower launcher.processes")
    killed = workers[said.index("5 5 5")]
    killed.kill()
    killed.wait()
    line = [sys.executable, "-c", code]
    after = subprocess.run(line, env=environment, text=True, capture_output=True, input="", check=True)
    for worker in workers:
        if worker is not killed:
            worker.communicate("")
    assert after.stdout.strip() == "5 5 5", "what the dead one had is free again"


def test_gpus_are_counted_without_starting_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab")
    assert devices.visible_gpus() == ["2", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: H200 (UUID: GPU-1)\\nGPU 1: H200 (UUID: GPU-2)\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.visible_gpus() == ["0", "1"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert devices.visible_gpus() == []
    monkeypatch.delenv(devices.LAUNCHER, raising=False)
    assert devices.claim_gpu() is None and not devices.is_worker()
