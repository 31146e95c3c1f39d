"""The study's list of jobs, and that processes share clips and go on where they were stopped."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent.parent
LINES = (ROOT / "scripts/study.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """scripts/study.py."""
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts/study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("line", sorted({line for line in LINES if line.startswith("experiment=")}))
def test_jobs_compose_with_all_seeds(
    study: ModuleType, line: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    jobs = study.jobs_of([line])
    config = composed("compare", *study.settings_of(jobs[-1], tmp_path))
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert config.seeds == config.batch == 20 and "dense" in config.methods
    wanted = "scenes" if "workload=scenes" in jobs[-1] else "doom"
    assert config.name in (f"study_{wanted}", f"quality_{wanted}") and config.backbone.name == wanted
    assert set(config.protocols) == (
        {"C"} if config.name.startswith("quality") else set(config.protocols) - {"C"}
    )


def test_commas_make_jobs(study: ModuleType) -> None:
    jobs = study.jobs_of(["# a comment", "", "a=1,2 b=[A],[B] 'c=[x, y]'"])
    assert jobs == [[f"a={a}", f"b=[{b}]", "c=[x,y]"] for a in (1, 2) for b in "AB"]


def test_measures_without_their_package_are_left_out(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(study, "find_spec", lambda name: None if name == "cv2" else name)
    job = ["experiment=quality", "metrics=quality"]
    left_out = [word for word in study.settings_of(job, tmp_path) if word.startswith("~")]
    assert left_out == ["~metrics.dynamic_degree_lite", "~metrics.motion_smoothness_lite"]
    assert not [word for word in study.settings_of(job[:1], tmp_path) if word.startswith("~")]


def test_lost_trajectories_are_made_again(study: ModuleType, tmp_path: Path) -> None:
    kinds = {"lost": ("dense", "C"), "kept": ("dense", "C"), "other": ("window", "C"), "b": ("dense", "B")}
    for name, (method, protocol) in kinds.items():
        (tmp_path / "study_doom" / name).mkdir(parents=True)
        labels = {"labels": {"method": method, "protocol": protocol}}
        (tmp_path / "study_doom" / name / "summary.json").write_text(json.dumps(labels))
    (tmp_path / "study_doom/kept/latents.safetensors").touch()
    shutil.copytree(tmp_path / "study_doom/lost", tmp_path / "bounded/mine")
    study.forget_lost_trajectories(tmp_path)
    assert {path.name for path in (tmp_path / "study_doom").iterdir()} == {"kept", "other", "b"}
    assert (tmp_path / "bounded/mine/summary.json").exists(), "what is not the study's is left alone"


def test_clips_are_made_once(study: ModuleType, tmp_path: Path) -> None:
    config = OmegaConf.create(
        {
            "source": "a",
            "data": {"a": {"seed": 0}},
            "prefill_frames": 4,
            "frames": 4,
            "backbone": {"name": "tiny"},
        }
    )
    made: list[list[int]] = []

    def load(seeds: list[int]) -> list[int]:
        made.append(seeds)
        return seeds

    for seeds in ([0, 1], [0, 1], [2]):
        assert study.shared_clips(tmp_path, config, load, seeds) == seeds
    assert made == [[0, 1], [2]]


def test_the_script_runs_its_jobs_and_packs_the_numbers(tmp_path: Path) -> None:
    lines = tmp_path / "jobs.txt"
    small = "method=[dense,window] debug=tiny source=noise metrics=none prefill_frames=16 frames=8 seeds=1 batch=1"
    jobs = ["protocols=[B]", "protocols=[B] backbone=none", "protocols=[C] +metrics.dead._target_=os.abort"]
    lines.write_text("".join(f"{job} {small}\n" for job in jobs))
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "RUNS": str(tmp_path / "runs"),
    }
    answer = subprocess.run(
        ["bash", "scripts/study.sh", "0", "--lines", str(lines)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert answer.returncode == 1, "one job failed, one took its process with it"
    assert "ended: 'protocols=[B]'" in answer.stdout and "failed, " in answer.stdout
    assert "died with status -6, its job undone" in answer.stdout
    assert "'done': 3" in answer.stdout
    packed = subprocess.run(
        ["tar", "-tzf", str(tmp_path / "out/study.tgz")], capture_output=True, text=True, check=True
    ).stdout
    assert packed.count("metrics.parquet") == 3 and "latents" not in packed
