"""VBench's score by hand and of a published row; the adapter against a fake VBench; what is missing, in a sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastar.metrics.quality.vbench import VBench, dimensions_for, read_result
from fastar.metrics.quality.vbench_score import DIMENSIONS, final_scores
from tests.metrics.quality.fake_vbench import write_interpreter, write_package

ANY = ["subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
       "dynamic_degree", "aesthetic_quality", "imaging_quality"]  # fmt: skip


# -- the formula -------------------------------------------------------------------------------------------------------


def test_score_by_hand() -> None:
    """Quality at its upper end but for the dynamic degree, which has half the weight; of semantics only the scene."""
    scores = {name: one.high if one.part == "quality" else one.low for name, one in DIMENSIONS.items()}
    scores |= {"dynamic_degree": 0.2, "scene": 0.4111}
    found = final_scores(scores)
    assert found["quality"] == pytest.approx((6 + 0.5 * 0.2) / 6.5)
    assert found["semantic"] == pytest.approx(0.5 / 9)
    assert found["total"] == pytest.approx((4 * 6.1 / 6.5 + 0.5 / 9) / 5)


def test_score_of_a_published_row() -> None:
    """HunyuanVideo on VBench's leaderboard: total 83.24 %, quality 85.09 %, semantic 75.82 %."""
    percent = {
        "subject_consistency": 97.37, "background_consistency": 97.76, "temporal_flickering": 99.44,
        "motion_smoothness": 98.99, "dynamic_degree": 70.83, "aesthetic_quality": 60.36, "imaging_quality": 67.56,
        "object_class": 86.10, "multiple_objects": 68.55, "human_action": 94.40, "color": 91.60,
        "spatial_relationship": 68.68, "scene": 53.88, "appearance_style": 19.80, "temporal_style": 23.89,
        "overall_consistency": 26.44,
    }  # fmt: skip
    found = final_scores({name: value / 100 for name, value in percent.items()})
    published = {"quality": 85.09, "semantic": 75.82, "total": 83.24}
    assert {name: round(100 * score, 2) for name, score in found.items()} == published


def test_a_part_that_lacks_a_dimension_is_left_out() -> None:
    quality = dict.fromkeys(ANY, 0.9)
    assert final_scores(quality).keys() == {"quality"}
    assert final_scores({**quality, "scene": 0.5}).keys() == {"quality"}, (
        "VBench's script would count eight zeros"
    )
    del quality["motion_smoothness"]
    assert final_scores(quality) == {}
    with pytest.raises(ValueError, match="no dimension beauty: it has subject_consistency"):
        final_scores({"beauty": 1.0})


# -- what can be asked -------------------------------------------------------------------------------------------------


def test_dimensions_of_a_mode() -> None:
    assert dimensions_for("standard", None, prompts=True) == list(DIMENSIONS) and len(DIMENSIONS) == 16
    assert dimensions_for("custom", None, prompts=False) == ANY
    with_prompts = dimensions_for("custom", None, prompts=True)
    assert len(with_prompts) == 10
    assert set(with_prompts) - set(ANY) == {"human_action", "temporal_style", "overall_consistency"}
    assert dimensions_for("long_custom", None, prompts=True) == ANY
    assert dimensions_for("custom", ["dynamic_degree"], prompts=False) == ["dynamic_degree"]
    for name, prompts, why in (("scene", True, "of any prompt"), ("human_action", False, "without prompts")):
        with pytest.raises(ValueError, match=f"{name} cannot score videos {why}"):
            dimensions_for("custom", [name], prompts=prompts)
    with pytest.raises(ValueError, match="dimensions must be one of"):
        dimensions_for("custom", ["beauty"], prompts=True)


# -- the process -------------------------------------------------------------------------------------------------------


def videos_in(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"a video")
    return folder


def asked(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "asked.json").read_text())
    return found


def test_custom_videos_with_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "of our own environment")
    write_interpreter(tmp_path)
    videos = videos_in(tmp_path / "videos", "a dog-0.mp4", "a cat, 'asleep' & $HOME-0.mp4")
    prompts = {"a dog-0.mp4": "a dog", "a cat, 'asleep' & $HOME-0.mp4": "a cat, 'asleep' & $HOME"}
    vbench = VBench("./python", weights="weights", download=True)
    assert vbench.check("custom", DIMENSIONS) == "of no known version"
    names = ["dynamic_degree", "imaging_quality"]
    found = vbench.evaluate(Path("videos"), Path("out"), "custom", names, prompts)
    assert found.scores == {"dynamic_degree": 0.5, "imaging_quality": 0.51} and found.missing == 0
    assert found.videos["dynamic_degree"] == dict.fromkeys(prompts, 1.0), "true is 1"
    assert found.videos["imaging_quality"] == dict(zip(sorted(prompts), (0.01, 0.02), strict=True))
    told = asked(tmp_path / "out")
    assert told["prompts"] == prompts and told["dimensions"] == names and told["mode"] == "custom_input"
    assert told["cwd"] == str((tmp_path / "out").resolve()) and told["cache"] == str(tmp_path / "weights")
    assert told["local"] is None and videos.exists()


def test_long_videos_from_a_clone(tmp_path: Path) -> None:
    """Scores of the clips that VBench-Long cuts a video into are its mean; options are handed on."""
    clone = write_package(tmp_path / "clone")
    videos = videos_in(tmp_path / "videos", "one-0.mp4", "two-0.mp4")
    vbench = VBench(sys.executable, repository=str(clone), download=True, options=["--dev_flag"])
    vbench.check("long_custom", ANY)
    found = vbench.evaluate(videos, tmp_path / "out", "long_custom", ["imaging_quality"], {})
    assert found.videos["imaging_quality"] == {"one-0.mp4": 0.005, "two-0.mp4": 0.015}
    told = asked(tmp_path / "out")
    assert told["mode"] == "long_custom_input" and told["dev_flag"]
    assert told["full_json_dir"] == str(clone / "vbench/VBench_full_info.json")
    found = vbench.evaluate(videos, tmp_path / "more", "long_standard", ["imaging_quality"], {})
    assert found.missing == 1, "VBench looks for videos of all its prompts"


def test_what_is_missing_is_one_sentence(tmp_path: Path) -> None:
    fake = str(write_interpreter(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    for vbench, mode, message in (
        (VBench("no/such/python"), "custom", "does not start .*: say python="),
        (VBench(str(write_interpreter(bare, package=False))), "custom", "has no package vbench: pip install"),
        (
            VBench(fake, weights=str(tmp_path)),
            "custom",
            "motion_smoothness needs amt_model/amt-s.pth, which is not",
        ),
        (VBench(fake, download=True), "long_custom", "VBench-Long needs repository="),
        (VBench(fake, repository=str(tmp_path)), "custom", "has no folder vbench: name a clone"),
        (VBench(fake), "short", "mode must be one of custom, standard"),
    ):
        with pytest.raises(ValueError, match=message):
            vbench.check(mode, ["motion_smoothness"])
    (tmp_path / "amt_model").mkdir()
    (tmp_path / "amt_model/amt-s.pth").touch()
    VBench(fake, weights=str(tmp_path)).check("custom", ["motion_smoothness", "temporal_flickering"])


def test_an_error_of_vbench_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VBENCH_FAILS", "1")
    vbench = VBench(str(write_interpreter(tmp_path)), download=True)
    videos = videos_in(tmp_path / "videos", "one-0.mp4")
    with pytest.raises(ValueError, match=r"no scores \(RuntimeError: no CUDA device\): see .*vbench\.log"):
        vbench.evaluate(videos, tmp_path / "out", "custom", ["imaging_quality"], {})


def test_results_of_other_videos_are_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "x_eval_results.json"
    details = [
        {"video_path": "/far/away/a-0.mp4", "video_results": 0.25},
        {"video_path": "b.mp4", "video_results": 1},
    ]
    path.write_text(json.dumps({"scene": [0.3, details]}))
    found = read_result(path, ["a-0.mp4"])
    assert found.scores == {"scene": 0.3} and found.videos == {"scene": {"a-0.mp4": 0.25}}
