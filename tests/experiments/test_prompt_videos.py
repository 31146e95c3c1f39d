"""experiments/rollout.py on a file of prompts: from published weights in tiny to videos named as VBench wants them."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fastar.backbones.wan import umt5
from fastar.compare import prompt_videos
from fastar.compare.prompt_videos import roll_prompts
from fastar.data.prompt_sets import read_prompts
from fastar.data.video import read_mp4
from fastar.results import load, load_runs
from tests.experiments.conftest import ROOT, values
from tests.wan_parts import write_text_encoder, write_transformer, write_vae

PROMPTS = "a red cat runs over the hill\na dog sits in the rain\n"
Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user downloads."""
    folder = tmp_path_factory.mktemp("parts")
    write_transformer(folder / "self_forcing.pt", generator=0.02, generator_ema=0)
    write_vae(folder)
    write_text_encoder(folder)
    return folder


@pytest.fixture
def composed(parts: Path, tmp_path: Path) -> Compose:
    (tmp_path / "prompts.txt").write_text(PROMPTS)

    def make(*overrides: str, data: str = "vbench", prompts: str = "prompts.txt") -> DictConfig:
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
            return compose("rollout", overrides=[*arguments(parts, tmp_path, data, prompts), *overrides])

    return make


def arguments(parts: Path, folder: Path, data: str = "vbench", prompts: str = "prompts.txt") -> list[str]:
    return [
        "backbone=tiny_text", f"data={data}", f"prompts={folder / prompts}", "rollout=self_forcing", "method=dense",
        f"checkpoint={parts / 'self_forcing.pt'}", "autoencoder=wan", f"autoencoder.checkpoint={parts}",
        f"data.encoder.checkpoint={parts}", "data.encoder.dtype=float32", "device=cpu", "frames=6", "warmup_chunks=1",
        f"paths.outputs={folder / 'outputs'}", f"paths.cache={folder / 'cache'}",
    ]  # fmt: skip


def test_every_prompt_becomes_videos_with_vbenchs_names(composed: Compose, tmp_path: Path) -> None:
    folder = roll_prompts(composed("videos_per_prompt=2"))
    names = [f"{prompt}-{index}.mp4" for prompt in PROMPTS.splitlines() for index in (0, 1)]
    assert {path.name for path in folder.iterdir()} == {*names, "videos.csv"}
    shown = [read_mp4(folder / name) for name in names]
    assert {tuple(video.shape) for video in shown} == {(21, 64, 96, 3)}, "6 latent frames: 1 + 4 * 5"
    assert len({bytes(video.numpy().tobytes()) for video in shown}) == 4
    rows, runs = load(tmp_path / "outputs"), load_runs(tmp_path / "outputs")
    assert set(runs["status"]) == {"done"} and set(runs["prompt"]) == {"1", "2"}
    sha256 = read_prompts(tmp_path / "prompts.txt").sha256
    assert set(runs["prompts_sha256"]) == {sha256[:12]}
    assert len(values(rows, "fps")) == 4 and len(values(rows, "decode_s")) == 8
    for chunk, frames in ((0, 9), (1, 12)):
        took, rate = (values(rows, name, chunk=chunk) for name in ("chunk_s", "fps_chunk"))
        assert took and [s * fps for s, fps in zip(took, rate, strict=True)] == pytest.approx([frames] * 4)
    with (folder / "videos.csv").open(newline="") as file:
        index = list(csv.DictReader(file))
    assert [row["file"] for row in index] == names and index[1]["seed"] == "1"
    assert {row["prompts_sha256"] for row in index} == {sha256}
    assert {row["run_id"] for row in index} == set(runs["run_id"])


def test_what_is_there_is_found_again_and_the_encoder_stays_away(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = roll_prompts(composed("frames=3", "data.count=1"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    monkeypatch.setattr(umt5.PromptEncoder, "_encode_all", lambda *nothing: pytest.fail("encoded again"))
    monkeypatch.setattr(prompt_videos, "free_run", lambda *nothing, **more: pytest.fail("made again"))
    assert roll_prompts(composed("frames=3", "data.count=1")) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")} == before
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        roll_prompts(composed("frames=3"))
