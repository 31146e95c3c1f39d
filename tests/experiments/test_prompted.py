"""experiments/rollout.py on the backbone scenes: a prompt file, a change on the way, what is shown beside it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fastar.compare import free
from fastar.compare.prompted import prompted_clip
from fastar.compare.single import roll
from fastar.data.scenes.render import render
from fastar.data.scenes.script import draw_script
from fastar.data.video import read_mp4
from fastar.interruption import Interrupted, listening
from fastar.results import load, load_runs
from fastar.rollout.rollout import Rollout
from tests.experiments.conftest import ROOT, command, values

OWL = "a large owl rests in the center; the wall has red and blue checks; the camera stays still."
BUS = "a big bus moves left from the middle right; the wall is green with gray dots; the camera stays still."
FILE = f"""shots:
  - {{frames: 12, text: '{OWL}'}}
  - {{frames: 12, text: '{OWL}'}}
changes:
  - at: 8
    rewrite: 4
    shots: [{{frames: 12, text: '{OWL}'}}, {{frames: 12, text: '{BUS}'}}]
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the shipped checkpoints are


def config(tmp_path: Path, text: str | None, *overrides: str, name: str = "words.yaml") -> DictConfig:
    given = []
    if text is not None:
        (tmp_path / name).write_text(text)
        given = [f"prompts={tmp_path / name}"]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        return compose(
            "rollout",
            overrides=[
                "backbone=scenes", "data=scenes", "method=dense", "device=cpu", f"paths.outputs={tmp_path}",
                "rollout.timesteps.num_steps=2", "warmup_chunks=1", *given, *overrides,
            ],
        )  # fmt: skip


def test_a_prompt_file_becomes_a_video_beside_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = roll(config(tmp_path, FILE))
    rows = load(folder)
    assert load_runs(folder).iloc[0]["status"] == "done"
    assert read_mp4(folder / "videos/rollout.mp4").shape == (24, 96, 128, 3)
    both = read_mp4(folder / "videos/side_by_side.mp4")
    assert both.shape[2] > 2 * 3 * 128 and len(values(rows, "psnr/truth")) == 6
    assert min(values(rows, "presence") + values(rows, "presence/changed")) > 0.7, (
        "the bus comes, not the owl"
    )
    assert len(values(rows, "fps")) == 1 and len(values(rows, "byte_share")) == 6
    assert str(folder) in capsys.readouterr().out
    assert roll(config(tmp_path, FILE.replace("- at: 8", "- at:   8"), name="copy.yaml")) == folder, (
        "found again"
    )
    others = {
        roll(config(tmp_path, text))
        for text in (FILE.replace("rewrite: 4", "rewrite: 0"), FILE.replace("at: 8", "at: 4"))
    }
    assert len(others | {folder}) == 3


def test_words_that_cannot_be_drawn_make_a_video_without_a_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = roll(config(tmp_path, "shots: [{frames: 12, text: a owl above the blue floor}]"))
    assert "no truth to compare with: cannot read 'a owl above the blue floor'" in capsys.readouterr().out
    assert [file.name for file in (folder / "videos").iterdir()] == ["rollout.mp4"]
    assert {"fps", "cache_bytes"} < set(load(folder)["metric"])
    assert not {"presence", "psnr/truth"} & set(load(folder)["metric"])


def test_without_a_file_it_is_the_held_out_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "fastar.compare.single.free_run", lambda session, method, clips, *rest, **more: seen.append(clips)
    )
    with pytest.raises(AttributeError):  # nothing was generated
        roll(config(tmp_path, None, "seed=3", "frames=24"))
    [clip] = seen
    script = draw_script(3, seed=3, split="heldout", frames=24)
    assert torch.equal(clip.truth[0], render(script)) and clip.prefill == 0 and not clip.changes


@pytest.mark.parametrize("stop_at", [2, 3])  # chunks; the prompt changes after the second
def test_stopped_around_the_change_it_goes_on_to_the_same_bits(
    tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    run = free.free_run

    def keep(*arguments: Any, **options: Any) -> Any:
        made["latents"] = run(*arguments, **options).latents
        raise KeyboardInterrupt

    monkeypatch.setattr("fastar.compare.single.free_run", keep)
    with pytest.raises(KeyboardInterrupt):
        roll(config(tmp_path, FILE, "name=whole", "save_every=100"))
    whole = made.pop("latents")

    chunks = 0
    denoise = Rollout.denoise

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal chunks
        chunks += 1
        if chunks == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return denoise(*arguments, **options)

    monkeypatch.setattr(Rollout, "denoise", count)
    with pytest.raises(Interrupted), listening():
        roll(config(tmp_path, FILE, "name=parts", "save_every=100"))
    assert chunks == stop_at and not made
    with pytest.raises(KeyboardInterrupt):
        roll(config(tmp_path, FILE, "name=parts", "save_every=100"))
    assert chunks == 6, "nothing was made twice"
    assert torch.equal(made["latents"], whole)


@pytest.mark.parametrize(("overrides", "reason"), [
    (["prefill_frames=4"], "leave actions and prefill_frames out"),
    (["actions=spin"], "leave actions and prefill_frames out"),
    (["frames=24"], "the prompt file says how many frames there are: leave frames out"),
    (["data=doom"], "reads prompts and data=doom has no encoder for them: add data=scenes"),
])  # fmt: skip
def test_settings_that_make_no_sense_together(tmp_path: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        roll(config(tmp_path, FILE, *overrides))


@pytest.mark.parametrize(("text", "reason"), [
    (FILE.replace("owl", "dragon"), "words.yaml: shot 1 of the prompt from frame 0 on: .*'dragon' is none of them"),
    (FILE.replace("bus", "buss"), "words.yaml: shot 2 of the prompt from frame 8 on: .*did you mean 'bus'"),
    (FILE.replace(BUS, " ".join(["owl"] * 80)), "a sentence has 82 tokens and the text encoder takes 64"),
])  # fmt: skip
def test_words_that_do_not_fit(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        roll(config(tmp_path, text))


def test_eight_sentences_of_the_greatest_length_fit(tmp_path: Path) -> None:
    longest = "{frames: 12, text: " + "owl " * 62 + "}, "
    assert prompted_clip(config(tmp_path, f"shots: [{longest * 8}]"), 4).prompts.lengths.tolist() == [512]


def test_a_backbone_without_text_takes_no_prompt_file(tmp_path: Path) -> None:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        doom = compose("rollout", overrides=["debug=tiny", "prompts=words.yaml", f"paths.outputs={tmp_path}"])
    with pytest.raises(ValueError, match="'tiny' reads no prompts: add backbone=scenes data=scenes"):
        roll(doom)


def test_the_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    arguments = ["backbone=scenes", "data=scenes", f"paths.outputs={tmp_path}", "device=cpu"]
    done = command("rollout.py", *arguments, "prompts=nowhere.yaml", folder=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: there is no prompt file nowhere.yaml; experiments/prompts/ has an example" in done.stderr


def test_a_cache_that_cannot_take_frames_back_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tempcache_paper merges every frame as it arrives"):
        roll(config(tmp_path, FILE, "method=tempcache_paper"))
