"""The commands as people give them: what they leave behind, a second time, and every experiment in small."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from fastar.compare import comparison
from fastar.compare.clips import steered_clip
from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.session import open_session
from fastar.compare.single import roll
from fastar.data.doom.camera import Action
from fastar.data.doom.dataset import DoomClips
from fastar.data.doom.script import PATHS, read_actions
from fastar.data.video import read_mp4
from fastar.results import load, load_runs
from fastar.sweep.callback import expand
from tests.experiments.conftest import ROOT, command, noise_clips, values
from tests.test_repository import command_of, debug_of

EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))
SWEEPS = [path for path in EXPERIMENTS if "sweeper:" in path.read_text()]


def varied(path: Path) -> bool:
    return float(np.asarray(Image.open(path).convert("RGB")).std()) > 5


@pytest.mark.timeout(300)  # half a minute, but the first import of everything is slow on a busy machine
def test_compare_from_the_command_line(tmp_path: Path) -> None:
    """A real clip, a method that fails, tables, pictures and a video; given again, nothing is run again."""
    arguments = [
        "debug=tiny", "seeds=1", "frames=8", "method=[dense,tempcache,window]", "protocols=[B,C]", "logger=csv",
        "methods.window.cache.budget_share=0.001", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    first = command("compare.py", *arguments)
    assert first.returncode == 1, f"one method failed: {first.stderr}"
    [report] = (tmp_path / "compare").glob("report_*")
    text = (report / "results.md").read_text()
    header = text.splitlines()[0]
    assert "backbone tiny" in header and "1 seed" in header and "8 frames generated after 64 true" in header
    assert re.search(r"checkpoint [0-9a-f]{8}, .* 1 threads", header)
    for part in (
        "psnr (dB) ↑",
        "revisit_psnr (dB) ↑",
        "vmaf ↑",
        "cache_bytes/end (MiB) ↓",
        "fps/steady (1/s) ↑",
    ):
        assert part in text, part
    assert "failed runs" in text and "| window | 0 | the cache budget of" in text
    assert "tempcache" in first.stdout and "failed runs" in first.stdout
    assert len((report / "results.csv").read_text().splitlines()) > 30
    pictures = [
        "fps_frames",
        "memory_frames",
        "fidelity_bytes_B",
        "revisit_bytes_B",
        "revisit_bytes_C",
        "frames",
    ]
    assert not [name for name in pictures if not varied(report / f"{name}.png")]
    video = read_mp4(report / "side_by_side.mp4").float()
    assert len(video) == 8 and video.std() > 5 and (video[0] - video[-1]).abs().max() > 5

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.parquet")}
    assert len(before) == 4  # dense and tempcache in B and C
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        compare(
            compose("compare", overrides=arguments)
        )  # in this process: the same identities in another one
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.parquet")} == before
    assert (report / "results.md").read_text() == text
    starts = load_runs(tmp_path / "compare").set_index(["method", "protocol"])["status"].to_dict()
    assert starts["window", "C"] == "failed" and starts["tempcache", "B"] == "done"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_in_small(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep at its first point."""
    program, overrides = command_of(path)
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        small = ["seeds=1", "batch=1", f"debug={debug_of(compose(program, overrides=overrides))}"]
        if "debug=tiny" in small:
            monkeypatch.setattr(comparison, "load_clips", noise_clips)
            small += ["prefill_frames=16", "frames=8", "metrics=fast"]
        config = compose(program, overrides=[*overrides, *small, f"paths.outputs={tmp_path}"])
    compare(config)
    runs = load_runs(tmp_path)
    assert set(runs["method"]) == set(config.methods) and (runs["status"] == "done").all()
    assert set(runs["protocol"]) == {*config.protocols, "C"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_composes_and_is_told_apart(path: Path, tmp_path: Path) -> None:
    """No two points are the same runs, and the table's columns say which is which."""
    program, overrides = command_of(path)
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        debug = f"debug={debug_of(compose(program, overrides=overrides))}"
        whole = compose(program, overrides=[*overrides, debug], return_hydra_config=True)
        swept = dict(whole.hydra.sweeper.params)
        jobs = expand(whole)
        assert len(jobs) == math.prod(len(str(values).split(",")) for values in swept.values()) > 1
        kept = [override for override in overrides if override.split("=")[0] not in swept]
        found: dict[str, str] = {}
        for job in jobs:
            config = compose(program, overrides=[*job, *kept, debug, f"paths.outputs={tmp_path}"])
            for run in Comparison(config, open_session(config)).planned():
                told = str(sorted((key, str(value)) for key, value in run.items() if key != "run_id"))
                assert found.setdefault(run["run_id"], told) == told
    assert len(set(found.values())) == len(found), "columns do not tell the variants apart"
    assert len(found) > len(jobs)


def test_budgets_of_a_sweep_meet_in_one_report(
    tiny: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in (0.1, 0.2):
        compare(tiny("method=[dense,window]", "protocols=[C]", "frames=8", f"budget_share={share}"))
    [report] = (tmp_path / "compare").glob("report_*")
    assert len(load_runs(tmp_path)) == 3, "dense does not depend on the budget"
    text = (report / "results.md").read_text()
    assert "| window 10% |" in text and "| window 20% |" in text and "| dense |" in text
    assert "window 20%" in capsys.readouterr().out


def rollout_config(tmp_path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        small = ["debug=tiny", "prefill_frames=16", "frames=8", "method=window", f"paths.outputs={tmp_path}"]
        return compose("rollout", overrides=[*small, *overrides])


def test_rollout_steered_by_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = roll(rollout_config(tmp_path, "actions='left*3,forward'", "seed=5"))
    run = load_runs(folder).iloc[0]
    assert run["status"] == "done" and run["method"] == "window"
    assert read_mp4(folder / "videos/rollout.mp4").shape == (8, 96, 128, 3)
    side = read_mp4(folder / "videos/side_by_side.mp4").float()
    simulator = side[:, :, : side.shape[2] // 2]
    assert (simulator[0] - simulator[1]).abs().mean() > 3, "the simulator turns"
    assert len(values(load(folder), "fps")) == 1
    assert str(folder) in capsys.readouterr().out
    assert roll(rollout_config(tmp_path, "actions='left*3,forward'", "seed=5")) == folder, "found again"
    assert roll(rollout_config(tmp_path, "actions=spin", "seed=5")) != folder


def test_actions_that_people_write(tmp_path: Path) -> None:
    left, forward = int(Action.TURN_LEFT), int(Action.FORWARD)
    assert read_actions("forward*2,left", 7) == [forward, forward, left, forward, forward, left, forward]
    assert read_actions("spin", 60) == [left] * 60 and set(PATHS) >= {"spin", "there_and_back"}
    (tmp_path / "walk.txt").write_text("1, 1\n3 left*2\n")
    assert read_actions(str(tmp_path / "walk.txt"), 5) == [forward, forward, left, left, left]
    with pytest.raises(ValueError, match="holds 5 actions, but 6 frames"):
        read_actions(str(tmp_path / "walk.txt"), 6)
    drawn = read_actions("random", 400, seed=1)
    assert drawn == read_actions("random", 400, seed=1) != read_actions("random", 400, seed=2)
    assert len(drawn) == 400 and {left, forward} <= set(drawn) <= {int(action) for action in Action}
    with pytest.raises(ValueError, match="unknown action 'jump': choose keys from none, forward"):
        read_actions("jump", 4)
    with pytest.raises(ValueError, match=r"write for example left\*12"):
        read_actions("left*x", 4)


def test_a_steered_clip_shows_what_the_actions_do() -> None:
    dataset = DoomClips(frames=8, split="heldout", cells=3, first_index=2, clips=1)
    _, walk = dataset.plan(2)
    clip = steered_clip(dataset, 2, [int(Action.TURN_LEFT)] * 48, prefill=8)
    assert clip.actions[0].tolist() == [*walk.actions, *[int(Action.TURN_LEFT)] * 48]
    assert torch.equal(clip.frames[0, :8], next(iter(dataset))["frames"])
    assert torch.equal(clip.frames[0, -1], clip.frames[0, 7]), "48 turns close a circle"
