"""Every method on every sampling loop: what the rows hold, what a backbone is told, and what becomes of failures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from fastar.benchmark import loops
from fastar.benchmark.command import run
from fastar.benchmark.loops import Given
from fastar.compare.command import with_all
from fastar.compare.session import open_session
from fastar.rollout.rollout import NonFiniteError
from tests.small import CONF

Configs = Callable[..., DictConfig]
SHORT = ("mode=loops", "loop_frames=7", "loop_budget=4")
FEWER = ("rollouts.diffusion_forcing.timesteps.num_steps=6", "rollouts.diffusion_forcing.stagger=2")
IMAGE = (
    "backbone=matrix_game_2", "backbone.transformer.dim=32", "backbone.transformer.num_heads=2",
    "backbone.transformer.num_layers=2", "backbone.transformer.ffn_dim=48", "backbone.transformer.image_dim=6",
    "+backbone.transformer.action_module.num_heads=1", "backbone.frame_size=[32,48]",
    "rollouts.matrix_game_2.timesteps.steps=[1000,500]",
)  # fmt: skip


def test_every_loop_is_a_row_of_each_method(
    benchmark_config: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = benchmark_config(*SHORT, *FEWER, "method=[dense,stock,window]")
    result = run(config)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"] == result["rows"]
    rows = {(row["loop"], row["method"]): row for row in result["rows"]}
    assert list(rows) == [
        (loop, m) for loop in config.loops_of.wan_1_3b for m in ("dense", "stock", "window")
    ]
    for row in rows.values():
        assert row["reason"] is None and row["finite"] and row["backbone"] == "tiny_text"
        assert row["latent_frames"] == 9 and row["chunks"] == 2 and not row["captured"]
        assert row["fps"] >= row["fps_end_to_end"] > 0 and row["fps_median"] > 0
        assert 0 < row["first_chunk_s"] < row["wall_s"] and row["peak_allocated"] > row["cache_bytes"]
    frame = 2 * 2 * 2 * 64 * 24  # bytes of keys and values in bfloat16
    assert rows["self_forcing", "dense"]["cache_slots"] == 9 * 24
    assert rows["rolling_forcing", "window"]["budget"] == 4
    assert {loop: row["steps"] for (loop, _), row in rows.items()} == {
        "self_forcing": 4, "causvid": 3, "longlive": 4, "longlive_infinity": 4, "rolling_forcing": 5,
        "diffusion_forcing": 6,
    }  # fmt: skip
    assert rows["rolling_forcing", "window"]["cache_bytes"] <= 4 * frame
    # each loop's own window: 12 frames that a pass sees, 3 of them its own; what it keeps has room for no more
    kept = {loop: row["cache_bytes"] for (loop, method), row in rows.items() if method == "stock"}
    assert kept["self_forcing"] >= kept["longlive"]


def test_a_backbone_of_images_and_actions(benchmark_config: Configs) -> None:
    config = benchmark_config(*SHORT, *IMAGE, "method=[dense,annca]")
    rows = run(config)["rows"]
    assert [(row["loop"], row["method"], row["finite"]) for row in rows] == [
        ("matrix_game_2", "dense", True), ("matrix_game_2", "annca", None),
    ]  # fmt: skip
    assert "selects by a prompt and the backbone 'matrix_game_2' reads none" in rows[1]["reason"]
    assert rows[0]["execution"] == "eager" and rows[0]["cache_bytes"] > 0
    given = Given.of(open_session(config), 9, seed=0)
    assert given.prompts is None and given.image is not None and given.actions is not None
    assert given.actions.shape == (1, 9, 12, 6) and given.image.latents.shape == (1, 9, 20, 4, 6)
    assert set(given.actions[..., 2:].unique().tolist()) == {0.0, 1.0}


def test_what_fails_is_a_row_and_what_was_measured_is_kept(
    benchmark_config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loops._run

    def failing(rollout: Any, session: Any, *rest: Any) -> Any:
        written = Path(config.output, "loops.json")
        before = json.loads(written.read_text())["rows"] if written.exists() else []
        if len(before) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if len(before) == 2:
            raise NonFiniteError("the backbone returned NaN")
        if len(before) == 3:
            raise KeyboardInterrupt
        return made(rollout, session, *rest)

    monkeypatch.setattr(loops, "_run", failing)
    config = benchmark_config(*SHORT, "method=[dense,stock,window,empty]", "loops=[causvid]")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    rows = json.loads(Path(config.output, "loops.json").read_text())["rows"]
    assert [(row["method"], row["finite"], row["reason"]) for row in rows] == [
        ("dense", True, None),
        ("stock", None, "CUDA out of memory."),
        ("window", False, "the backbone returned NaN"),
    ]


def test_loops_that_are_not_there_are_refused(benchmark_config: Configs) -> None:
    with pytest.raises(ValueError, match="unknown loop 'few_step': choose one of self_forcing"):
        run(benchmark_config(*SHORT, "loops=[few_step]"))


def test_every_loop_of_conf_is_measured_on_some_backbone(benchmark_config: Configs) -> None:
    config = benchmark_config("mode=loops")
    wanted, backbones = ({path.stem for path in (CONF / g).glob("*.yaml")} for g in ("rollout", "backbone"))
    measured = {name for names in config.loops_of.values() for name in names}
    assert config.rollouts.keys() == measured == wanted - {"few_step"} and config.loops_of.keys() <= backbones
    assert benchmark_config("backbone=matrix_game_2").loops == ["matrix_game_2"]
    assert benchmark_config("backbone=wan_14b").loops == config.loops_of.wan_1_3b


def test_all_methods_are_spelt_out() -> None:
    first, second = with_all(["mode=loops", "method=all"], CONF / "method")
    assert first == "mode=loops" and second.startswith("method=[annca,") and "dense_merged" in second
    assert with_all(["method=[dense]"], CONF / "method") == ["method=[dense]"]


@pytest.mark.gpu
def test_loops_on_a_gpu(benchmark_config: Configs) -> None:
    settings = ["device=cuda", "dtype=bfloat16", "loop_frames=15", "loops=[self_forcing,rolling_forcing]"]
    rows = run(benchmark_config(*SHORT, "method=[dense,stock,window]", *settings, "capture=true"))["rows"]
    assert all(row["reason"] is None and row["finite"] for row in rows)
    assert all(row["peak_reserved"] >= row["peak_allocated"] > row["cache_bytes"] for row in rows)
    assert {row["execution"] for row in rows} == {"fused, linears=model"}
    assert any(row["captured"] for row in rows)
