"""What a result was made with: code, versions, machine. Nothing that names a person, a path or a host."""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastar.interruption import slurm_job

PACKAGES = (
    "torch", "triton", "numpy", "lightning", "torchmetrics", "diffusers", "hydra-core", "omegaconf", "faiss-cpu",
    "faiss-gpu", "flash-attn-4", "flashinfer-python", "imageio-ffmpeg", "vizdoom",
)  # fmt: skip


def environment(*, device: torch.device | str = "cpu", seeds: Sequence[int] = ()) -> dict[str, Any]:
    """JSON-able record of code, versions, hardware and seeds.

    Keys: time (UTC, start), fastar, git (commit, dirty; None outside a checkout), python, platform, packages
    (name -> version of those installed), cuda, driver, device, device_memory_bytes, device_count, cpu, cores, threads,
    memory_bytes, host (hash of its name: tells runs of different machines apart), slurm_job, seeds.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastar": version_of("fastar"),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := version_of(name)) is not None},
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": nvidia_driver() if on_gpu else None,
        "device": device_name(device),
        "device_memory_bytes": properties.total_memory if properties else None,
        "device_count": torch.cuda.device_count() if on_gpu else 0,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8],
        "slurm_job": slurm_job(),
        "seeds": list(seeds),
    }


def device_name(device: torch.device | str) -> str:
    """Marketing name of a GPU, or the CPU's model: what a timing depends on."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit": sha, "dirty": bool} of the checkout that tracks the code in `folder`; None if there is none."""
    if shutil.which("git") is None or not _git(folder, "ls-files", "."):
        return None  # an installed package may lie inside somebody else's checkout, which does not track it
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", ":/")
    return None if commit is None or status is None else {"commit": commit, "dirty": bool(status)}


def code_of(made: Mapping[str, Any]) -> str:
    """The code behind an `environment`, in few characters: its commit, marked + if files differed from it."""
    git = made.get("git") or {}
    return str(git.get("commit") or "unknown")[:8] + ("+" if git.get("dirty") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    answer = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver as nvidia-smi tells it, or None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else None


def cpu_model() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
