"""experiments/rollout.py on backbones that start from an image: Wan I2V with prompts, Matrix-Game 2.0 with actions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.played import played_clip
from fastar.compare.prompt_clips import part_of_set, prompt_clips
from fastar.compare.prompt_videos import roll_prompts
from fastar.compare.session import open_session
from fastar.compare.single import roll
from fastar.compare.starts import image_encoder_of
from fastar.data.video import read_mp4
from fastar.results import load, load_runs
from tests.experiments.conftest import ROOT, values
from tests.wan_parts import write_image_encoder, write_text_encoder, write_vae

Compose = Callable[..., DictConfig]
SMALL = [
    "backbone.frame_size=[32,48]", "backbone.transformer.dim=32", "backbone.transformer.num_layers=2",
    "backbone.transformer.num_heads=2", "backbone.transformer.ffn_dim=48", "backbone.transformer.image_dim=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user downloads."""
    folder = tmp_path_factory.mktemp("parts")
    write_vae(folder)
    write_text_encoder(folder)
    write_image_encoder(folder)
    return folder


@pytest.fixture
def composed(parts: Path, tmp_path: Path) -> Compose:
    Image.new("RGB", (96, 64), (250, 20, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (96, 64), (10, 220, 30)).save(tmp_path / "green.png")
    (tmp_path / "own.csv").write_text("prompt,start\na red cat,red.png\na dog,\n")

    def make(kind: str, *overrides: str, name: str = "rollout") -> DictConfig:
        shared = [
            "checkpoint=random", "autoencoder=wan", f"autoencoder.checkpoint={parts}", "device=cpu", "frames=6",
            "head_errors=null", f"data.image_encoder.checkpoint={parts}", f"paths.outputs={tmp_path / 'outputs'}",
            f"paths.cache={tmp_path / 'cache'}", f"image={tmp_path / 'green.png'}",
        ]  # fmt: skip
        if name == "rollout":
            shared += ["method=dense", "warmup_chunks=1"]
        kinds = {
            "i2v": [
                "backbone=wan_i2v_14b", "rollout=self_forcing", "data=prompts", f"prompts={tmp_path / 'own.csv'}",
                f"data.encoder.checkpoint={parts}", "data.encoder.dtype=float32", "backbone.transformer.text_dim=48",
                "backbone.transformer.text_len=24",
            ],
            "game": [
                "backbone=matrix_game_2", "rollout=matrix_game_2", "data=image", 'actions="forward*4,camera_left*8"',
                "+backbone.transformer.action_module.num_heads=1",
            ],
        }  # fmt: skip
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
            return compose(name, overrides=[*kinds[kind], *SMALL, *shared, *overrides])

    return make


def identities(folder: Path) -> list[dict]:
    return [json.loads(path.read_text())["config"] for path in folder.rglob("summary.json")]


def test_prompts_with_images_become_videos(composed: Compose, tmp_path: Path) -> None:
    """The image of its own, or the one of the command line; all frames are made, the first among them."""
    folder = roll_prompts(composed("i2v"))
    shown = [read_mp4(folder / name) for name in ("a red cat-0.mp4", "a dog-0.mp4")]
    assert {tuple(video.shape) for video in shown} == {(21, 32, 48, 3)}
    assert set(load_runs(tmp_path / "outputs")["status"]) == {"done"}
    found = identities(tmp_path)
    assert len({config["starts"][0] for config in found}) == 2 and all(c["image_encoder"] for c in found)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2
    other = roll_prompts(composed("i2v", f"image={tmp_path / 'red.png'}", "data.first=1"))
    assert not torch.equal(read_mp4(other / "a dog-0.mp4"), shown[1]), (
        "the image matters, and makes another run"
    )


def test_the_condition_is_of_the_image_and_grey_frames(composed: Compose) -> None:
    config = composed("i2v")
    session, images = open_session(config), image_encoder_of(config.data, config.backbone)
    assert images is not None
    clips = prompt_clips(
        part_of_set(config.data).entries, instantiate(config.data.encoder), session.backbone.config,
        generated=6, prefill=None, stride=4, images=images,
    )  # fmt: skip
    assert (clips.prefill, clips.end, clips.frames.shape[1]) == (0, 6, 0)
    found = session.image_of(clips)
    assert found is not None and clips.start is not None
    assert torch.equal(found.tokens, images.encode(clips.start.frames[:, 0]))
    assert found.latents.shape == (2, 6, 20, 4, 6)
    assert found.latents[:, 0, :4].eq(1).all() and found.latents[:, 1:, :4].eq(0).all()
    video = torch.zeros(2, 21, 3, 32, 48)
    video[:, 0] = clips.start.frames[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(found.latents[:, :, 4:], session.eyes().encode(video))


def test_methods_are_compared_on_images(composed: Compose, tmp_path: Path) -> None:
    settings = ["source=prompts", "seeds=1", "prefill_frames=0", "protocols=[B,C]", "method=[dense,empty]"]
    compare(composed("i2v", *settings, "metrics=fast", name="compare"), report=False)
    runs = load_runs(tmp_path / "outputs")
    assert set(runs["status"]) == {"done"} and len(runs) == 4
    assert all(config["data"]["image_encoder"] for config in identities(tmp_path))


def test_a_game_is_played_from_an_image(composed: Compose, tmp_path: Path) -> None:
    run = roll(composed("game"))
    assert read_mp4(run / "videos" / "rollout.mp4").shape == (21, 32, 48, 3)
    (config,) = identities(tmp_path)
    assert {"image", "actions", "image_encoder", "autoencoder"} <= config.keys()
    assert str(tmp_path) not in json.dumps(config), "where files lie does not count"
    assert roll(composed("game")) == run, "found again"
    assert roll(composed("game", "actions=random")) != run
    assert roll(composed("game", f"image={tmp_path / 'red.png'}")) != run


def test_methods_are_compared_on_a_game(composed: Compose, tmp_path: Path) -> None:
    """Each seed presses its own keys; dense denoises its own video again, whose actions have a past of their own."""
    settings = ["source=image", "actions=random", "seeds=2", "batch=2", "prefill_frames=0", "metrics=fast"]
    config = composed("game", *settings, "protocols=[A,B,C]", "method=[dense,empty]", name="compare")
    compare(config, report=False)
    rows, runs = load(tmp_path / "outputs"), load_runs(tmp_path / "outputs")
    assert set(runs["status"]) == {"done"} and len(runs) == 6
    for protocol in "AB":
        assert values(rows, "latent_error", method="dense", protocol=protocol) == [0] * 4
        assert min(values(rows, "latent_error", method="empty", protocol=protocol, chunk=1)) > 0
    assert {path.stem for path in tmp_path.rglob("generated_seed*.mp4")} == {"generated_seed0"}
    assert all(
        found["data"].keys() == {"image", "actions", "image_encoder"} for found in identities(tmp_path)
    )
    assert str(tmp_path) not in json.dumps(identities(tmp_path)), "where files lie does not count"
    session = open_session(config)
    told = played_clip(config, session.backbone.config, [0, 1]).actions
    assert told.shape == (2, 6, 12, 6) and not torch.equal(told[0], told[1])
    with pytest.raises(ValueError, match=r"there is none at nowhere\.png"):
        Comparison(composed("game", *settings, "image=nowhere.png", name="compare"), session).planned()
    with pytest.raises(ValueError, match="'wan_i2v_14b' has no mouse and keyboard to be played with"):
        config = composed("i2v", *settings, name="compare")
        Comparison(config, open_session(config))


def test_actions_reach_the_frames_that_they_lead_to(composed: Compose) -> None:
    config = composed("game")
    clip = played_clip(config, open_session(config).backbone.config, [0])
    assert clip.actions.shape == (1, 6, 12, 6) and clip.end == 6
    mouse, keys = clip.actions[0].split([2, 4], dim=-1)
    assert keys[0, :, 0].eq(1).all(), "before the first frame it is as in it"
    # latent frame 2 ends at video frame 8 and is told frames -4 to 7: 8 of `forward` and 4 of `camera_left`
    assert keys[2, :, 0].tolist() == [1] * 8 + [0] * 4
    torch.testing.assert_close(mouse[2, :, 1], torch.tensor([0.0] * 8 + [-0.1] * 4))


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("game", ["image=null"], "starts from an image: name its file with image=FILE"),
        ("game", ["image=nowhere.png"], "there is none at nowhere.png"),
        ("game", ["actions=clip"], "say what is pressed: actions=random, held keys"),
        ("game", ["actions=fly"], "unknown action 'fly'"),
        ("game", ["frames=4"], "frames=4 must be a whole number of 3-frame chunks"),
        ("game", ["data.image_encoder=null"], "starts from an image and data=image has none: use data=image"),
        ("i2v", ["image=null"], r"starts from an image and makes all frames: name it by image=FILE"),
        ("i2v", ["prefill_frames=3"], "and leave prefill_frames out"),
        ("i2v", ["image=nowhere.png"], "there is no image nowhere.png"),
        ("i2v", ["image=own.csv"], "own.csv is no image or video"),
        ("i2v", ["backbone.transformer.image_dim=9"], "makes tokens 8 wide and the backbone 'wan_i2v_14b' reads 9"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_one_sentence(
    composed: Compose, kind: str, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError, InstantiationException), match=message):
        (roll_prompts if kind == "i2v" else roll)(composed(kind, *overrides))
