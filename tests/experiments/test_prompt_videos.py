"""experiments/rollout.py on a file of prompts: from published weights in tiny to videos named as VBench wants them."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from fastar.backbones.storage import sha256_of
from fastar.backbones.wan import umt5
from fastar.compare import prompt_videos
from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.prompt_clips import prompt_clips
from fastar.compare.prompt_videos import roll_prompts, videos_of
from fastar.compare.session import open_session
from fastar.data.prompt_sets import read_prompts
from fastar.data.video import read_mp4, write_mp4
from fastar.results import load, load_runs
from fastar.rollout.rollout import Rollout
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
        "backbone=tiny_text", "backbone.frame_size=[32,48]", f"data={data}", f"prompts={folder / prompts}",
        "rollout=self_forcing", "method=dense",
        f"checkpoint={parts / 'self_forcing.pt'}", "autoencoder=wan", f"autoencoder.checkpoint={parts}",
        f"data.encoder.checkpoint={parts}", "data.encoder.dtype=float32", "device=cpu", "frames=6", "warmup_chunks=1",
        f"paths.outputs={folder / 'outputs'}", f"paths.cache={folder / 'cache'}",
    ]  # fmt: skip


def test_every_prompt_becomes_videos_with_vbenchs_names(composed: Compose, tmp_path: Path) -> None:
    folder = roll_prompts(composed("videos_per_prompt=2"))
    names = [f"{prompt}-{index}.mp4" for prompt in PROMPTS.splitlines() for index in (0, 1)]
    assert {path.name for path in folder.iterdir()} == {*names, "videos.csv"}
    shown = [read_mp4(folder / name) for name in names]
    assert {tuple(video.shape) for video in shown} == {(21, 32, 48, 3)}, "6 latent frames: 1 + 4 * 5"
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


def test_a_video_begins_with_the_image_or_video_of_its_prompt(composed: Compose, tmp_path: Path) -> None:
    """The image stands still for a chunk, 9 pixel frames; the video is cut to them; both get the backbone's size."""
    Image.new("RGB", (200, 100), (250, 20, 30)).save(tmp_path / "red.png")
    frames = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 64, 96, 3) * 20
    write_mp4(tmp_path / "grey.mp4", frames)
    (tmp_path / "own.csv").write_text("prompt,start,seed\na red cat,red.png,3\na dog,grey.mp4,\na hill,,\n")
    config = composed("frames=3", data="prompts", prompts="own.csv")
    folder = roll_prompts(config)
    assert {path.stem for path in folder.glob("*.mp4")} == {"a red cat-3", "a dog-0", "a hill-0"}
    assert {len(read_mp4(path)) for path in folder.glob("a [rd]*.mp4")} == {12}, (
        "three latent frames after the start"
    )
    assert len(read_mp4(folder / "a hill-0.mp4")) == 9, "three latent frames from nothing"
    session, encoder = open_session(config), instantiate(config.data.encoder)
    entries = read_prompts(tmp_path / "own.csv").entries
    options = {"generated": 3, "prefill": None, "stride": 4}
    red, grey, nothing = (
        prompt_clips([entry], encoder, session.backbone.config, **options) for entry in entries
    )
    assert red.frames.shape == grey.frames.shape == (1, 9, 32, 48, 3) and nothing.frames.shape[1] == 0
    assert (red.frames == torch.tensor([250, 20, 30])).all()
    assert (grey.frames[0, :, 16, 24, 0] - 20 * torch.arange(9)).abs().max() <= 3
    assert session.beginning(red).shape == (1, 3, *session.backbone.config.latent_shape)
    assert red.identity() != prompt_clips([replace(entries[0], start=tmp_path / "grey.mp4")], encoder,
                                          session.backbone.config, **options).identity()  # fmt: skip
    with pytest.raises(
        ValueError, match=r"grey\.mp4 has 11 frames, 3 latent ones, and 21 are needed: take a"
    ):
        prompt_clips(entries[1:2], encoder, session.backbone.config, generated=3, prefill=6, stride=4)
    with pytest.raises(ValueError, match="with and without a start cannot share a batch: set batch=1"):
        prompt_clips(entries, encoder, session.backbone.config, **options)


def test_interrupted_it_goes_on_to_the_same_video(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that decodes begins anew and comes to where it was."""
    settings = ["frames=9", "data.count=1", "save_every=1"]
    whole = roll_prompts(composed(*settings, "name=whole"))
    step, chunks = Rollout.step, 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal chunks
        chunks += 1
        if chunks == 3:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(Rollout, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        roll_prompts(composed(*settings, "name=parts"))
    parts = roll_prompts(composed(*settings, "name=parts"))
    assert chunks == 4, "nothing was made twice"
    [name] = (path.name for path in whole.glob("*.mp4"))
    assert torch.equal(read_mp4(parts / name), read_mp4(whole / name)) and len(read_mp4(parts / name)) == 33


def test_one_video_that_fails_leaves_the_others_alone(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prompt_videos.free_run

    def fail(session: Any, method: Any, clips: Any, seeds: Any, *rest: Any, **more: Any) -> Any:
        if clips.entries[0].id == "1":
            raise RuntimeError("out of luck")
        return run(session, method, clips, seeds, *rest, **more)

    monkeypatch.setattr(prompt_videos, "free_run", fail)
    with pytest.raises(
        ValueError, match=r"1 of 2 videos could not be made; the first, a red .*-0\.mp4: out of luck"
    ):
        roll_prompts(composed("frames=3"))
    assert sorted(load_runs(tmp_path / "outputs")["status"]) == ["done", "failed"]
    [video] = tmp_path.glob("outputs/rollout/videos_*/*.mp4")
    assert video.name == "a dog sits in the rain-0.mp4"


def test_prompts_that_are_no_file_names_are_called_by_their_id(tmp_path: Path) -> None:
    long = "a very long prompt " * 20
    rows = [
        "prompt,id,seed",
        "plain,x,",
        "with/slash,y,",
        f"{long},z,5",
        "twice,a,",
        "twice,b/c,",
        "twice,d,9",
    ]
    rows.append(".hidden,e,")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    chosen = replace(read_prompts(tmp_path / "own.csv"))
    with pytest.raises(ValueError, match="videos_per_prompt must be at least 1, got 0"):
        videos_of(chosen, 0, 0)
    # the second `twice` is the same video as the first: only its id differs
    names = [video.file for video in videos_of(chosen, 0, 2)]
    stems = ["plain-0", "plain-1", "y-0", "y-1", "z-5", "z-6"]
    stems += ["twice-0", "twice-1", "twice-9", "twice-10", "e-0", "e-1"]
    assert names == [f"{stem}.mp4" for stem in stems]
    rows[5] = "twice,b/c,1"
    (tmp_path / "own.csv").write_text("\n".join(rows))
    names = [video.file for video in videos_of(read_prompts(tmp_path / "own.csv"), 0, 2)]
    assert names[6:10] == ["twice-0.mp4", "a-1.mp4", "b_c-1.mp4", "twice-2.mp4"], "both would be twice-1.mp4"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts=null"], "data=vbench reads a file of prompts: name it with prompts=FILE"),
        (["frames=4"], "frames=4 must be a whole number of 3-frame chunks"),
        (["backbone=doom"], "the backbone 'doom' reads no prompts: leave data=vbench out"),
        (["data.first=2"], "has 2 prompts: there are none from number 2 on"),
        (["method=[dense,window]"], "a rollout takes one method"),
        (["data.prompts.extended=nowhere.txt"], "there is no prompt file nowhere.txt"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(
    composed: Compose, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError, InstantiationException), match=message):
        roll_prompts(composed(*overrides))


def test_a_lora_of_the_command_line_is_recorded(composed: Compose, parts: Path, tmp_path: Path) -> None:
    """Another run than without it, whose summary has its checksum; random weights have none to change."""
    name, file = "blocks.1.ffn.2", tmp_path / "lora.pt"
    torch.save(
        {f"{name}.lora_A.weight": torch.ones(1, 192), f"{name}.lora_B.weight": torch.ones(64, 1)}, file
    )
    settings = ("frames=3", "data.count=1")
    for more in ((), (f"lora={file}",)):
        roll_prompts(composed(*settings, *more))
    found = [json.loads(path.read_text())["config"] for path in tmp_path.rglob("summary.json")]
    assert sorted(config.get("lora", "") for config in found) == ["", sha256_of(file)]
    assert len({path.read_bytes() for path in tmp_path.rglob("rollout.mp4")}) == 2
    with pytest.raises(ValueError, match=r"leave lora=\.\.\. out, or name its checkpoint"):
        roll_prompts(composed(*settings, f"lora={file}", "checkpoint=random"))


def test_guidance_leads_away_from_a_negative_prompt(composed: Compose, tmp_path: Path) -> None:
    """SkyReels-V2's: another prompt to avoid is another run; without guidance nothing is avoided."""
    settings = ("frames=3", "data.count=1", "rollout.guidance=4")
    for more in ((), ("negative_prompt=dog",), ("negative_prompt=dog", "rollout.guidance=null")):
        roll_prompts(composed("rollout=diffusion_forcing", "rollout.timesteps.num_steps=3", *settings, *more))
    found = [json.loads(path.read_text())["config"] for path in tmp_path.rglob("summary.json")]
    assert sorted(str(config.get("negative_prompt")) for config in found) == ["", "None", "dog"]
    assert len({path.read_bytes() for path in tmp_path.rglob("rollout.mp4")}) == 3


# -- compared ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(parts: Path, tmp_path: Path) -> Compose:
    """A comparison on prompts."""
    Image.new("RGB", (96, 64), (250, 20, 30)).save(tmp_path / "red.png")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "own.csv").write_text("prompt,start\na red cat,red.png\na dog,red.png\n")

    def make(*overrides: str, prompts: str = "prompts.txt") -> DictConfig:
        rolled = [
            word for word in arguments(parts, tmp_path, "prompts", prompts) if not word.startswith("method=")
        ]
        given = ["source=prompts", "head_errors=null", "metrics=fast", "seeds=2"]
        given.append("method=[dense,empty]")
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
            return compose("compare", overrides=[*rolled, *given, *overrides])

    return make


def test_methods_are_compared_on_prompts_in_pixels(compared: Compose, tmp_path: Path) -> None:
    compare(compared("prefill_frames=0", "protocols=[C]", "videos=2"))
    rows, runs = load(tmp_path / "outputs"), load_runs(tmp_path / "outputs")
    assert set(runs["status"]) == {"done"} and len(runs) == 4
    assert len(values(rows, "psnr", method="empty")) == 4 and not values(rows, "psnr/truth")
    assert values(rows, "psnr", method="empty", chunk=0, seed=0) == [100], "one chunk alone is the same"
    shown = read_mp4(next(tmp_path.rglob("generated_seed1.mp4")))
    assert shown.shape == (21, 64, 96, 3) and list(tmp_path.rglob("side_by_side.mp4"))
    config = json.loads(next(tmp_path.rglob("summary.json")).read_text())["config"]
    assert config["data"]["prompts"] == read_prompts(tmp_path / "prompts.txt").sha256[:16]
    assert str(tmp_path) not in json.dumps(config), "where files lie does not count"


@pytest.mark.parametrize(("given", "prompts"), [(3, "own.csv"), (0, "prompts.txt")])
def test_every_protocol_decodes_each_chunk_after_the_frames_before_it(
    compared: Compose, tmp_path: Path, given: int, prompts: str
) -> None:
    """Dense denoises its own trajectory again: only if the decoder stands where it stood are the pixels the same.

    With an image to begin with, and from frame 0 on prompts alone, where the first chunk has no past to lack.
    """
    settings = [f"prefill_frames={given}", "protocols=[A,B]", "seeds=1", "save_every=1", "attention_chunks=2"]
    compare(compared(*settings, "name=whole", prompts=prompts), report=False)
    rows = load(tmp_path / "outputs" / "whole")
    first, last = (values(rows, "recall", method="empty", protocol="A", chunk=chunk) for chunk in (0, 1))
    assert (first == [pytest.approx(1)]) == (given == 0) and last[0] < 0.9
    for protocol in "AB":
        assert values(rows, "latent_error", method="dense", protocol=protocol) == [0, 0]
        assert values(rows, "psnr", method="dense", protocol=protocol) == [100, 100]
        first, last = values(rows, "psnr", method="empty", protocol=protocol)
        assert (first == 100) == (given == 0) and last < 100
        assert len(values(rows, "byte_share", method="dense", protocol=protocol)) == (2 if given else 1)

    made = 0

    def interrupt(chunks: int) -> None:
        nonlocal made
        made += chunks
        if made == 5:  # in the second chunk of protocol A
            raise KeyboardInterrupt

    config = compared(*settings, "protocols=[A]", "name=parts", prompts=prompts)
    with pytest.raises(KeyboardInterrupt):
        Comparison(config, open_session(config), advance=interrupt).run()
    compare(config, report=False)
    resumed = load(tmp_path / "outputs" / "parts")
    for metric in ("psnr", "latent_error"):
        expected = values(rows, metric, method="empty", protocol="A")
        assert values(resumed, metric, method="empty", protocol="A") == expected and len(expected) == 2
