"""A comparison in this process: the real configs, the tiny backbone with random weights, clips of noise."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from fastar.compare import comparison
from fastar.compare.clips import Clips
from fastar.compare.session import Session, open_session

ROOT = Path(__file__).resolve().parents[2]


def command(script: str, *overrides: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command as people give it, from `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "experiments" / script), *overrides]
    return subprocess.run(
        line, env=environment, capture_output=True, text=True, check=False, timeout=280, cwd=folder
    )


def noise_clips(
    data: DictConfig, source: str, seeds: Sequence[int], *, prefill: int, generated: int
) -> Clips:
    """Clips that need no simulator; each a function of its seed."""
    items = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randint(
            0, 256, (prefill + generated, 96, 128, 3), dtype=torch.uint8, generator=generator
        )
        items.append((frames, torch.randint(0, 7, (prefill + generated,), generator=generator)))
    returns = torch.arange(prefill, prefill + 8).expand(len(seeds), 8)
    masks = torch.zeros(len(seeds), 8, 96, 128, dtype=torch.bool)
    masks[:, :, 20:60, 30:90] = True
    frames, actions = (torch.stack(parts) for parts in zip(*items, strict=True))
    return Clips(frames, actions, prefill, returns, masks)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DictConfig]]:
    """`tiny("method=[dense,window]", "seeds=1")`: a config of compare.yaml that takes a second to run."""
    monkeypatch.setattr(comparison, "load_clips", noise_clips)
    small = ["debug=tiny", "prefill_frames=16", "frames=16", "seeds=1", f"paths.outputs={tmp_path}"]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        yield lambda *overrides: compose("compare", overrides=[*small, "metrics=fast", *overrides])
    GlobalHydra.instance().clear()


@pytest.fixture
def sessions(tiny: Callable[..., DictConfig]) -> Callable[..., Session]:
    """A fresh session of a config; its weights may be tampered with."""
    return lambda *overrides: open_session(tiny(*overrides))


def values(table: Any, metric: str, **where: Any) -> list[float]:
    """Values of a metric in the rows whose columns equal `where`, in order."""
    chosen = table[table["metric"] == metric]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return [float(value) for value in chosen["value"]]
