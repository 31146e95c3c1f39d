"""What all tests share: one thread a worker, no network, fixed seeds, GPU tests only where there is a GPU."""

import os

# Before torch and the sinks are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported: its kernels run on the CPU, slowly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whatever ran before it in the same worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global state
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one: a test that takes it runs on each."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """`composed("train", "backbone=tiny")`: a resolved-on-access config from the real conf/ tree."""
    with initialize_config_dir(config_dir=str(REPOSITORY / "conf"), version_base=None):
        yield lambda name, *overrides: compose(name, overrides=list(overrides))
    GlobalHydra.instance().clear()
