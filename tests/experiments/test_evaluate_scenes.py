"""The scenes model card's measures: on a random model, and on videos that show just what a prompt says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from fastar.backbones import WanConfig, build_backbone
from fastar.backbones.checkpoint import save_backbone
from fastar.compare import evaluation, evaluation_scenes
from fastar.compare.evaluation_base import Batch, Evaluation
from fastar.data.scenes.dataset import NUM_ACTIONS
from fastar.data.scenes.detector import presence
from fastar.data.scenes.embedding import CLAUSE_CODE, SHOT_CODE
from fastar.data.scenes.render import render
from fastar.data.scenes.script import draw_script
from tests.small import CONF
from tests.training.small import AUTOENCODER

CLIPS, FRAMES = 3, 24
Settings = Callable[..., DictConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A config of evaluate.yaml for a random text-to-video model of 24 frames, and its output in tmp_path/out."""
    backbone = build_backbone(
        name="scenes",
        transformer=WanConfig(
            dim=32, num_layers=2, num_heads=2, ffn_dim=48, freq_dim=32, in_channels=4, out_channels=4,
            num_actions=NUM_ACTIONS, text_dim=8 + SHOT_CODE + CLAUSE_CODE, text_len=512,
        ),
        autoencoder=AUTOENCODER, frame_size=(96, 128), chunk_frames=4, context_frames=FRAMES,
    )  # fmt: skip
    with torch.no_grad():  # a fresh head is zero, and its videos those of the noise alone
        for parameter in backbone.transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    save_backbone(tmp_path / "checkpoint", backbone)

    def make(*overrides: str) -> DictConfig:
        fixed = [
            "backbone=scenes", "data=scenes", f"checkpoint={tmp_path}/checkpoint", f"output={tmp_path}/out",
            f"backbone.context_frames={FRAMES}", f"clips={CLIPS}", "device=cpu", "batch=2", "num_workers=0",
        ]  # fmt: skip
        with initialize_config_dir(str(CONF), version_base=None):
            config = compose("evaluate", overrides=[*fixed, *overrides])
        if "encoder" in config.data:
            config.data.encoder = {"_target_": "tests.letters.Letters"}
        return config

    return make


def results(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "out" / "backbone.jsonl").read_text().splitlines()
    return {row.pop("measure"): row for row in map(json.loads, lines)}


def test_all_measures_of_a_random_model(settings: Settings, tmp_path: Path, device: torch.device) -> None:
    evaluation.run(settings(f"device={device.type}"))
    found = results(tmp_path)
    assert list(found) == ["autoencoder_psnr", "presence", "shuffled"]
    own = found["presence"]
    assert own["clips"] == found["shuffled"]["clips"] == CLIPS
    assert own["real"] > 0.9 > 0.3 > max(own["share"], own["other_script"], own["autoencoder"])
    for row in (own, found["shuffled"]):
        assert row["low"] <= row["share"] <= row["high"] and math.isfinite(row["psnr"])
    for name in ("presence", "shuffled"):
        with Image.open(tmp_path / "out" / f"{name}.png") as sheet:
            assert sheet.mode == "P" and sheet.width > 12 * 128
    card = (tmp_path / "out" / "backbone.md").read_text()
    assert card.count(f" {CLIPS} clips") == 3 and f"| at least 97 % | {100 * own['real']:.1f} % |" in card


def test_numbers_depend_on_the_prompt_and_not_on_batch_or_workers(settings: Settings, tmp_path: Path) -> None:
    measures = "measures=[presence,shuffled]"
    evaluation.run(settings(measures))
    first = results(tmp_path)
    assert first["presence"]["psnr"] != pytest.approx(first["shuffled"]["psnr"], rel=1e-5)
    evaluation.run(settings(measures, "batch=1", "num_workers=2"))
    again = results(tmp_path)
    for name, row in first.items():
        assert again[name]["psnr"] == pytest.approx(row["psnr"], rel=1e-6)


def test_a_shuffled_video_has_its_own_timecode_and_noise_and_the_other_prompt(settings: Settings) -> None:
    ev = Evaluation(settings())
    clips = next(iter(ev.clips("heldout", 2)))
    own = {key: clips[key] for key in ("actions", "index")}
    text = {key: clips[key] for key in ("prompt", "prompt_tokens")}
    other_text = {key: value.flip(0) for key, value in text.items()}
    other = {"actions": clips["actions"].flip(1), "index": clips["index"].flip(0)}

    def video(clips: Batch, told: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return evaluation_scenes._generate(ev, clips, told)

    generated = video(own | text, own | text)
    assert torch.equal(video(own | other_text, other | text), generated)
    assert not torch.equal(video(own, other_text), generated)
    for key, value in other.items():
        assert not torch.equal(video(own | {key: value}, text), generated)


def test_a_perfect_model_is_found_everywhere_and_a_shuffled_one_nowhere(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_scenes, "_generate", lambda ev, clips, told: told["frames"])
    evaluation.run(settings("measures=[presence,shuffled]"))
    found = results(tmp_path)
    own, shuffled = found["presence"], found["shuffled"]
    scripts = [draw_script(i, split="heldout", frames=FRAMES) for i in range(CLIPS + 1)]
    videos = [render(script).permute(0, 3, 1, 2) for script in scripts]

    def mean(pairs: list[tuple[int, int]]) -> float:
        return sum(presence(videos[video], scripts[script]).share for video, script in pairs) / len(pairs)

    assert own["share"] == own["real"] == pytest.approx(mean([(i, i) for i in range(CLIPS)]))
    assert own["other_script"] == pytest.approx(mean([(i, i + 1) for i in range(CLIPS)]))
    assert shuffled["share"] == pytest.approx(mean([(i + 1, i) for i in range(CLIPS)]))
    assert own["share"] > 0.95 > 0.3 > max(own["other_script"], shuffled["share"])
    assert own["psnr"] == 100.0 > shuffled["psnr"]
    expected = sum(int(presence(v, s).expected.sum()) for v, s in zip(videos[:-1], scripts[:-1], strict=True))
    assert own["actor_frames"] == expected
    motions = {str(actor.motion) for s in scripts[:-1] for shot in s.shots for actor in shot.actors}
    assert set(own["by_motion"]) == motions and set(own["by_size"]) <= {"small", "large"}
    assert all(
        0.8 < share <= 1 for kind in ("actors", "motion", "size") for share in own[f"by_{kind}"].values()
    )


def test_what_does_not_fit_is_refused(settings: Settings, repository: Path) -> None:
    with pytest.raises(
        ValueError, match="'memory' does not fit data=scenes: choose from autoencoder, presence, shuf"
    ):
        evaluation.run(settings("measures=[memory]"))
    with pytest.raises(ValueError, match="reads no prompts: choose data=doom for it, not data=scenes"):
        evaluation.run(settings(f"checkpoint={repository}/checkpoints/tiny"))
    with pytest.raises(ValueError, match="reads prompts: choose data=scenes for it, not data=doom_tiny"):
        evaluation.run(settings("data=doom_tiny"))
    with pytest.raises(ValueError, match="data=noise has no held-out clips"):
        evaluation.run(settings("data=noise"))
