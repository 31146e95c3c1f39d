"""Rollouts of methods beside a baseline: what their rows count, and what becomes of those that cannot run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from fastar.benchmark import contents, workload
from fastar.benchmark.command import run
from fastar.benchmark.page import Page

Configs = Callable[..., DictConfig]


def test_rows_of_methods_and_budgets(benchmark_config: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    config = benchmark_config(
        "mode=rollout", "method=[stock,window,tempcache,dense]", "steady.fill_frames=12"
    )
    result = run(config)
    printed = capsys.readouterr().out
    assert json.loads(printed.strip().splitlines()[-1])["rows"] == json.loads(json.dumps(result["rows"]))
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["stock", "window", "tempcache", "dense"]
    assert all(row["reason"] is None and row["weights"] == "random" for row in rows.values())
    for row in rows.values():
        assert row["fps_denoise"] > row["fps_commit"] >= row["fps"] > 0
        assert row["pass_ms"] > 0 and row["over_floor"] == pytest.approx(
            row["pass_ms"] / row["pass_floor_ms"]
        )
        assert row["chunk_frames"] == 12 and row["latency_p50"] <= row["latency_p99"]
    assert rows["stock"]["ratio"] == 1 and rows["stock"]["full"] == rows["window"]["full"] == 1
    assert rows["window"]["fill_frames"] == 6  # the budget's 4 frames are full after two chunks
    assert rows["window"]["cache_bytes"] <= 4 * 2 * 2 * 2 * 64 * 24 and rows["window"]["budget"] == 4
    assert rows["dense"]["full"] == 0 and rows["dense"]["fill_frames"] == 12
    # the baseline makes its chunks before and after those of each method
    assert rows["stock"]["chunks"] == 1 + 3 * 2 and rows["window"]["chunks"] == 2
    curve = pd.read_parquet(config.output + "/rollout_chunks.parquet")
    grown = curve[curve["method"] == "dense"].sort_values("latent_frame")
    assert grown["cache_bytes"].is_monotonic_increasing and grown["latent_frame"].iloc[0] == 3
    assert set(curve["method"]) == set(rows)


def test_a_method_that_cannot_run_is_a_row_with_its_reason(benchmark_config: Configs) -> None:
    rows = run(benchmark_config("mode=rollout", "method=[stock,window]", "budgets=[1,4]"))["rows"]
    assert [row["budget"] for row in rows] == [None, 1, 4]
    assert "fewer than the 72 of one chunk" in rows[1]["reason"] and rows[2]["reason"] is None


def test_decoding_and_dense_are_rows_of_their_own(benchmark_config: Configs) -> None:
    dense = ["dense.beside=true", "dense.latent_frames=[12]", "dense.video_frames=48"]
    rows = run(benchmark_config("mode=rollout", "method=[stock,empty]", "decoders=[light]", *dense))["rows"]
    decoded, stock = rows[-1], rows[0]
    assert [row.get("method") for row in rows] == ["stock", "empty", *["dense, shared"] * 3, None]
    assert stock["over_dense"] == pytest.approx(stock["fps_commit"] / rows[-2]["fps"])
    assert decoded["decoder"] == "light" and decoded["parameters"] == 9_845_507
    assert decoded["fps"] == pytest.approx(12 / decoded["ms"] * 1e3)
    assert stock["fps_decode"] == pytest.approx(1 / (1 / stock["fps_commit"] + 1 / decoded["fps"]))


def test_a_backbone_with_actions(benchmark_config: Configs) -> None:
    settings = ["backbone=tiny", "rollout=few_step", "rollout.window.attended_frames=8", "video_stride=1"]
    dense = ["dense.beside=true", "dense.latent_frames=[8]", "dense.video_frames=8"]
    rows = run(benchmark_config("mode=rollout", "method=[stock,empty]", *settings, *dense))["rows"]
    assert [row["reason"] for row in rows] == [None] * 5
    assert rows[0]["chunk_frames"] == 4


def test_what_is_missing_is_told_before_anything_is_measured(benchmark_config: Configs) -> None:
    with pytest.raises(ValueError, match="'stock' is measured against: name it in"):
        run(benchmark_config("mode=rollout", "method=[window]"))
    with pytest.raises(ValueError, match="ends after 62 latent frames and 72 are needed"):
        run(benchmark_config("mode=rollout", "method=[stock,window]", "steady.chunks=4"))
    with pytest.raises(ValueError, match="several chunks in flight are not measured"):
        run(benchmark_config("mode=rollout", "rollout=rolling_forcing"))
    with pytest.raises(ValueError, match="unknown mode 'fast': choose one of engines"):
        run(benchmark_config("mode=fast"))
    with pytest.raises(ValueError, match="captured on CUDA alone"):
        run(benchmark_config("mode=rollout", "capture=true"))


@pytest.mark.gpu
def test_memory_on_a_gpu_is_each_methods_own(benchmark_config: Configs) -> None:
    config = benchmark_config("mode=rollout", "method=[stock,window,dense]", "device=cuda", "dtype=bfloat16")
    rows = {row["method"]: row for row in run(config)["rows"]}
    assert all(row["reason"] is None for row in rows.values())
    assert all(row["peak_reserved"] >= row["peak_allocated"] > 0 for row in rows.values())
    assert rows["dense"]["peak_allocated"] > rows["window"]["peak_allocated"]
    curve = pd.read_parquet(config.output + "/rollout_chunks.parquet")
    window = curve[curve["method"] == "window"]["peak_chunk"]
    assert window.tail(2).nunique() == 1


def test_capture_is_asked_for_where_it_can_be_done() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert workload._capture(None, cuda) and workload._capture(True, cuda)
    assert not workload._capture(False, cuda) and not workload._capture(None, cpu)


@pytest.mark.parametrize("must", [False, True])
def test_a_method_that_cannot_be_captured(
    must: bool, benchmark_config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: object, capture: bool = False, **options: object) -> str:
        if capture:
            raise ValueError("passes cannot be captured with a PaperCache: set capture to false")
        return "rollout"

    config = benchmark_config("mode=rollout")
    opened = workload.open_workload(config, Page(config), latent_frames=3)
    opened = replace(opened, must_capture=must)
    monkeypatch.setattr(workload, "start_rollout", start)
    if must:
        with pytest.raises(ValueError, match="cannot be captured with a PaperCache"):
            opened.start(opened.variants[0], capture=True)
    else:
        assert opened.start(opened.variants[0], capture=True) == ("rollout", False)


def test_a_trained_backbone_commits_its_own_clips(
    benchmark_config: Configs, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.conftest import noise_clips

    monkeypatch.setattr(contents, "render_clips", noise_clips)
    trained = [
        "backbone=tiny",
        "data=doom_tiny",
        f"checkpoint={repository}/checkpoints/tiny",
        "rollout=few_step",
    ]
    shares = [
        "history_frames=16",
        "budget_shares=[0.5]",
        "rollout.window.attended_frames=12",
        "video_stride=1",
    ]
    asked = ["mode=rollout", "method=[stock,window,dense]", *trained, *shares, "steady.fill_frames=16"]
    config = benchmark_config(*asked)
    opened = workload.open_workload(config, Page(config), latent_frames=20)
    clips = noise_clips(config.data, "heldout", [0, 1], prefill=16, generated=0)
    assert opened.contents.about == "2 held-out clips" and opened.motion.distinct == 1
    assert torch.equal(opened.contents.actions, clips.actions.flatten()[None])
    encoded = opened.session.encode(clips.frames[1:, :4])
    torch.testing.assert_close(opened.motion.chunk(16, 4, torch.device("cpu")), encoded, atol=2e-3, rtol=2e-3)
    rows = {row["method"]: row for row in run(config)["rows"]}
    assert all(row["reason"] is None and row["weights"] != "random" for row in rows.values())
    assert rows["window"]["budget"] == 8 and rows["window"]["budget_share"] == 0.5
    assert "budget_share" not in rows["stock"] and not rows["dense"]["captured"]
    with pytest.raises(
        ValueError, match="latents must have 16 channels; give it clips of its own, as in data=doom"
    ):
        run(benchmark_config("mode=rollout", "backbone=doom", "rollout=few_step"))
