"""Mouse and keyboard as people write them down."""

import json
from pathlib import Path

import pytest
import torch

from fastar.data.controls import CAMERA, KEYS, read_controls

UNIVERSAL = {"keyboard_dim": 4, "mouse_dim": 2}


def test_held_keys_are_repeated() -> None:
    keys, mouse = read_controls("forward*2,left+camera_up+camera_right,none", frames=6, **UNIVERSAL)
    assert mouse is not None and mouse.dtype == torch.float32
    assert keys.tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 1, 0], [0] * 4] + [[1, 0, 0, 0]] * 2
    torch.testing.assert_close(mouse, torch.tensor([[0, 0], [0, 0], [0.1, 0.1], [0, 0], [0, 0], [0, 0]]))
    keys, mouse = read_controls("jump,none", keyboard_dim=7, mouse_dim=0, frames=2)
    assert keys.argmax(1).tolist() == [1, 0] and keys.sum(1).tolist() == [1, 1] and mouse is None


def test_files_hold_a_row_for_every_frame(tmp_path: Path) -> None:
    (tmp_path / "drive.csv").write_text("back,mouse_right,forward\n0,0.1,1\n1,-0.05,0\n0,0,0\n")
    objects = [{"forward": 1, "mouse_right": 0.1}, {"back": 1, "mouse_right": -0.05}, {}]
    (tmp_path / "drive.json").write_text(json.dumps(objects))
    for name in ("drive.csv", "drive.json"):
        keys, mouse = read_controls(str(tmp_path / name), frames=3, **UNIVERSAL)
        assert keys.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
        assert mouse is not None
        torch.testing.assert_close(mouse, torch.tensor([[0, 0.1], [0, -0.05], [0, 0]]))
        with pytest.raises(ValueError, match="holds 3 video frames of actions, and 4 are needed"):
            read_controls(str(tmp_path / name), frames=4, **UNIVERSAL)


def test_random_ones_are_held_and_come_again() -> None:
    keys, mouse = read_controls("random", frames=60, seed=3, **UNIVERSAL)
    assert mouse is not None and torch.equal(keys, read_controls("random", frames=60, seed=3, **UNIVERSAL)[0])
    assert keys.sum(1).eq(1).all() and len(keys.unique(dim=0)) > 1
    assert {tuple(row) for row in mouse.mul(10).round().div(10).tolist()} <= {(0, 0)} | {
        tuple(torch.tensor(move).mul(10).round().div(10).tolist()) for move in CAMERA.values()
    }
    held = keys.unflatten(0, (-1, 12))
    assert (held == held[:, :1]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward*0", "'forward\\*0' holds an action for '0' frames"),
        ("run", "unknown action 'run': choose from forward, back, left, right, camera_up"),
        ("nowhere.csv", "there is no file of actions nowhere.csv"),
    ],
)
def test_actions_that_are_none_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_controls(text, frames=2, **UNIVERSAL)


def test_files_and_models_that_do_not_fit(tmp_path: Path) -> None:
    for content, message in (
        ('[{"jump": 1}]', r"a\.json, frame 0 has 'jump': known are forward, back, left, right, mouse_up"),
        ("[3]", "frame 0 has a int"),
        ('{"forward": 1}', "is no list: write an object for every video frame"),
        ("[{", "line 1 is no JSON"),
        ('[{"forward": "x"}]', "frame 0 holds something that is no number"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_controls(str(tmp_path / "a.json"), frames=1, **UNIVERSAL)
    with pytest.raises(ValueError, match="unknown action 'camera_up'"):
        read_controls("camera_up", keyboard_dim=7, mouse_dim=0, frames=1)
    with pytest.raises(ValueError, match="not of 3 and 2: pass windows of actions"):
        read_controls("none", keyboard_dim=3, mouse_dim=2, frames=1)
    assert {len(names) for names in KEYS.values()} == set(KEYS)
