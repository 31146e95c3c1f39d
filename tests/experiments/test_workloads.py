"""Experiments moved to another backbone by one override, and comparisons without pixels."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.compare import comparison, weights
from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.runs import ComparisonRuns
from fastar.compare.session import open_session
from fastar.compare.weights import random_backbone
from fastar.results import load, load_runs
from fastar.results.loading import FAILURE
from tests.experiments.conftest import ROOT, command, noise_clips, values
from tests.experiments.test_comparison import run, untimed
from tests.test_repository import command_of

Compose = Callable[..., DictConfig]
METHODS = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))
WORKLOADS = sorted(path.stem for path in (ROOT / "conf/workload").glob("*.yaml"))
WAN = "workload=wan_1_3b_speed"


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Compose]:
    """A config of compare.yaml that writes to tmp_path."""
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        yield lambda *overrides: compose("compare", overrides=[f"paths.outputs={tmp_path}", *overrides])
    GlobalHydra.instance().clear()


def test_every_method_runs_without_pixels_on_a_text_backbone(composed: Compose, tmp_path: Path) -> None:
    settings = ["debug=tiny_text", "batch=2", "protocols=[A,B,C]", "frames=6", "videos=2"]
    config = composed(WAN, f"method=[{','.join(METHODS)}]", *settings, "dtype=bfloat16")
    for (
        method
    ) in config.methods.values():  # kernels, which an interpreter runs in minutes, have tests of their own
        if method.cache.get("commit_by") == "fused":
            method.cache.commit_by = "plain"
    compare(config)
    rows, runs = load(tmp_path), load_runs(tmp_path)
    assert set(runs["method"]) == set(METHODS) and len(runs) == 3 * len(METHODS)
    assert (runs["status"] == "done").all() and not (rows["metric"] == FAILURE).any()
    found = {metric.split("/")[0] for metric in rows["metric"]}
    assert found >= {
        "latent_error",
        "recall",
        "output_error",
        "density",
        "cache_bytes",
        "fps_commit",
        "chunk_s",
    }
    assert not found & {"psnr", "ssim", "vmaf", "revisit_psnr", "frechet", "fps_decode", "decode_s"}
    assert set(rows.loc[rows["metric"] == "recall", "protocol"]) == {"A"}
    for protocol in "ABC":
        moved = values(rows, "latent_error", method="empty", protocol=protocol)
        assert len(moved) == 4 and min(moved) > 0, protocol  # two chunks of two clips
    assert values(rows, "latent_error", method="dense", protocol="B") == [0.0] * 4
    assert not list(tmp_path.rglob("*.mp4"))
    [report] = (tmp_path / "compare").glob("report_*")
    text = (report / "results.md").read_text()
    assert "backbone tiny_text" in text and "latent_error" in text and "psnr" not in text


@pytest.mark.parametrize("cross", ["annca_lsh", "annca_quantized"])
def test_annca_is_one_override_away(composed: Compose, tmp_path: Path, cross: str) -> None:
    override = f"cross_attention@methods.fast_ar.cross_attention={cross}"
    config = composed(
        "debug=tiny_text", "method=[dense,fast_ar]", "protocols=[C]", "frames=6", "seeds=1", override
    )
    assert config.methods.fast_ar.cross_attention._target_ == "fastar.sparsity.AnnCA"
    run(config)
    run(composed("debug=tiny_text", "method=[dense,fast_ar]", "protocols=[C]", "frames=6", "seeds=1"))
    rows = load(tmp_path)
    assert not (rows["metric"] == FAILURE).any()
    errors = values(rows, "latent_error", method="fast_ar")
    assert len(errors) == 4 and len(set(errors)) == 4  # two chunks, with AnnCA and without


@pytest.mark.parametrize("protocols", ["[C]", "[A,B]"])
def test_interrupted_and_resumed_to_the_same_numbers(
    composed: Compose, tmp_path: Path, protocols: str
) -> None:
    """Text and the fresh noise between steps are those of an uninterrupted run."""
    arguments = [WAN, "debug=tiny_text", "method=[dense,tempcache]", f"protocols={protocols}"]
    arguments += ["save_every=1", "seeds=[2]"]
    assert composed(*arguments).rollout.renoise
    run(composed(*arguments, "name=whole"))
    for stop in (3, 6, 11):
        made = 0

        def interrupt(done: int, stop: int = stop) -> None:
            nonlocal made
            made += done
            if made == stop:
                raise KeyboardInterrupt

        config = composed(*arguments, "name=parts")
        total = Comparison(config, open_session(config)).total_chunks
        if stop < total:
            with pytest.raises(KeyboardInterrupt):
                Comparison(config, open_session(config), advance=interrupt).run()
    run(config)
    whole = untimed(tmp_path / "whole")
    pd.testing.assert_frame_equal(untimed(tmp_path / "parts"), whole, check_exact=True)
    assert min(values(whole, "latent_error", method="tempcache")) > 0


def test_a_batch_is_the_same_videos_with_their_own_prompts(composed: Compose, tmp_path: Path) -> None:
    small = ["debug=tiny_text", "method=[dense,window]", "protocols=[C]", "seeds=2", "frames=6"]
    latents = {}
    for batch in (1, 2):
        config = composed(*small, f"batch={batch}", f"name=by{batch}")
        session = open_session(config)
        made = []
        for seeds in ([0], [1]) if batch == 1 else ([0, 1],):
            clips = comparison.load_clips(config.data, "noise", seeds, prefill=21, generated=6)
            method = Comparison(config, session).methods["dense"]
            rollout = session.start(method, seeds, prompts=clips.prompts)
            rollout.prefill(session.beginning(clips))
            made.append(torch.cat(list(rollout.generate(6)), 1))
        latents[batch] = torch.cat(made)
    torch.testing.assert_close(latents[1], latents[2], rtol=0, atol=2e-5)
    assert (latents[1][0] - latents[1][1]).abs().max() > 0.1


# -- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_any_experiment_moves_to_any_workload(composed: Compose, path: Path, workload: str) -> None:
    name, overrides = command_of(path)
    assert name == "compare"
    alone, config = composed(*overrides), composed(*overrides, f"workload={workload}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert list(config.methods) == list(alone.methods) and config.budget_share == alone.budget_share
    chunk = config.backbone.chunk_frames
    assert config.source in config.data and not config.frames % chunk and not config.prefill_frames % chunk
    wan = config.backbone.name == "wan_1_3b"
    assert wan == workload.startswith("wan_") == (config.dtype == "bfloat16")
    assert (workload == "wan_1_3b_speed") == (not config.metrics)
    assert (workload == "wan_prompts") == ("autoencoder" in config) == (config.source == "prompts")
    for node in OmegaConf.to_container(config.methods, resolve=True).values():
        assert node["self_attention"].get("block_q", config.block_queries) == config.block_queries
        assert not (wan and node["cache"].get("head_errors"))


@pytest.mark.parametrize("debug", ["tiny", "tiny_text"])
def test_the_wan_workload_runs_in_small(composed: Compose, tmp_path: Path, debug: str) -> None:
    """debug=tiny comes last: the Doom stand-in then runs on noise, with random actions."""
    config = composed(
        WAN, f"debug={debug}", "method=[dense,fast_ar]", "seeds=1", "frames=12", "prefill_frames=24"
    )
    assert config.backbone.name == debug and config.source == "noise"
    compare(config)
    runs, rows = load_runs(tmp_path), load(tmp_path)
    assert (runs["status"] == "done").all() and set(runs["protocol"]) == {"B", "C"}
    assert not [metric for metric in rows["metric"] if "psnr" in metric]


def test_the_doom_workload_runs_in_small(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "load_clips", noise_clips)
    small = ["debug=tiny", "seeds=1", "prefill_frames=16", "frames=8", "method=[dense,window]"]
    compare(composed("workload=doom_returns", *small))
    assert set(load_runs(tmp_path)["protocol"]) == {"A", "B", "C"}
    assert values(load(tmp_path), "revisit_psnr", method="window")


def test_workloads_open_with_their_command() -> None:
    for name in WORKLOADS:
        text = (ROOT / f"conf/workload/{name}.yaml").read_text()
        assert re.search(rf"^#   python experiments/compare\.py .*workload={name}", text, re.MULTILINE), name


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["debug=tiny_text", "source=returns"],
            "'tiny_text' has no autoencoder to see the pixels of source=returns",
        ),
        (["debug=tiny_text", "source=returns"], "use source=noise, or a workload"),
        (
            ["backbone=tiny", "data=noise", "checkpoint=random", "head_errors=null"],
            "data=noise has no clips of source=returns",
        ),
        (["debug=tiny_text", "frames=4"], "3-frame chunks: ask for 3"),
        (["debug=tiny", "prefill_frames=0"], "prefill_frames must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(composed: Compose, overrides: list[str], message: str) -> None:
    config = composed(*overrides)
    with pytest.raises(ValueError, match=message):
        Comparison(config, open_session(config))


def test_missing_text_is_a_failed_run_with_one_sentence(composed: Compose, tmp_path: Path) -> None:
    config = composed("debug=tiny_text", "method=[dense]", "protocols=[C]", "seeds=1", "frames=6")
    config.data.noise.text_dim = None
    Comparison(config, open_session(config)).run()
    rows = load(tmp_path)
    [reason] = rows.loc[rows["metric"] == FAILURE, "reason"]
    assert reason == "this backbone reads text and none was given: pass prompts of 1 videos, 48 wide"


def test_a_rollout_to_look_at_needs_pixels(tmp_path: Path) -> None:
    arguments = ["backbone=tiny_text", "checkpoint=random", "head_errors=null", f"paths.outputs={tmp_path}"]
    done = command("rollout.py", *arguments, "prefill_frames=3", "frames=3")
    assert done.returncode and done.stderr.strip().splitlines()[-1] == (
        "error: the backbone 'tiny_text' has no autoencoder to see pixels with: add one, as in autoencoder=wan"
    )


# -- random weights --------------------------------------------------------------------------------------------------


def test_random_weights_of_large_backbones_are_known_by_their_config(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cpu = composed("backbone=tiny_text").backbone, torch.device("cpu")
    small = random_backbone(config, cpu)
    monkeypatch.setattr(weights, "LARGE", 1)
    before = torch.get_rng_state()
    large, again, other = (
        random_backbone(config, cpu),
        random_backbone(config, cpu),
        random_backbone(config, cpu, 1),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert large.sha256 == again.sha256 and len({small.sha256, large.sha256, other.sha256}) == 3
    deeper = composed("backbone=tiny_text", "backbone.transformer.num_layers=3").backbone
    assert random_backbone(deeper, cpu).sha256 != large.sha256
    tensors = [dict(backbone.transformer.named_parameters()) for backbone in (large, again, other)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert all(torch.equal(tensors[0][name], x) for name, x in small.transformer.named_parameters())
    assert not torch.equal(tensors[0]["blocks.0.ffn.0.weight"], tensors[2]["blocks.0.ffn.0.weight"])
    assert all(x.any() for x in tensors[0].values() if x.ndim > 1), "nothing that matters is zero"


def test_wan_is_counted_as_large() -> None:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        node = compose("compare", overrides=[WAN]).backbone
    shapes = instantiate(node, device="meta").transformer
    assert sum(parameter.numel() for parameter in shapes.parameters()) == 1_418_996_800 >= weights.LARGE


def test_the_text_encoder_counts_by_its_weights_wherever_it_lies(composed: Compose, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "checkpoints" / "minilm_scenes", tmp_path / "encoder")
    found = []
    for folder in (ROOT / "checkpoints" / "minilm_scenes", tmp_path / "encoder"):
        config = composed("workload=scenes", f"data.encoder.folder={folder}")
        found.append(ComparisonRuns(config, open_session(config), {}).shared(1))
    assert found[0] == found[1] and str(tmp_path) not in str(found)
    sha256 = json.loads((tmp_path / "encoder" / "config.json").read_text())["sha256"]
    assert found[0]["data"]["encoder"] == sha256


def test_the_scenes_demo_finds_the_words_and_draws_them(composed: Compose, tmp_path: Path) -> None:
    """The shipped model: with a quarter of its prompt, chosen by co-occupancy or at random."""
    short = ["frames=8", "protocols=[A]", "method=[dense,ranked_lsh,random_tokens]", "threads=1"]
    compare(composed("experiment=scenes_demo", *short))
    rows = load(tmp_path / "scenes_demo")
    for metric in ("prompt_recall", "prompt_mass", "psnr"):
        ranked, drawn = (values(rows, metric, method=name) for name in ("ranked_lsh", "random_tokens"))
        assert sum(ranked) > sum(drawn), metric
    assert max(values(rows, "prompt_share", method="ranked_lsh")) < 0.26
    assert set(values(rows, "prompt_share", method="dense")) == {1}
    assert min(values(rows, "presence", method="dense")) > 0.5
    pictures = {path.name for path in tmp_path.glob("scenes_demo/report*/*.png")}
    assert pictures >= {"words_random_tokens.png", "words_ranked_lsh.png", "words_prompt_recall_A.png"}
    assert "words_dense.png" not in pictures
