"""The redundancy study in this process: tiny backbones with random weights, a clip of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from fastar.compare import redundancy
from fastar.compare.clips import AnyClips, load_clips
from fastar.metrics.names import METRICS
from fastar.results import load
from fastar.results.qualifiers import qualified, unfold
from tests.experiments.conftest import ROOT, noise_clips

Tiny = Callable[..., DictConfig]


def clips(data: DictConfig, source: str, seeds: Sequence[int], *, prefill: int, generated: int) -> AnyClips:
    """Clips that need no simulator."""
    make = load_clips if source == "noise" else noise_clips
    return make(data, source, seeds, prefill=prefill, generated=generated)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """`tiny("method=[dense]")`: a config of redundancy.yaml that takes a second or two to run."""
    monkeypatch.setattr(redundancy, "load_clips", clips)
    small = ["debug=tiny", "frames=12", "seeds=1", "looks=1", "pca_layer=1", "rollout.timesteps.num_steps=2"]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        yield lambda *overrides: compose(
            "redundancy", overrides=[*small, f"paths.outputs={tmp_path}", *overrides]
        )
    GlobalHydra.instance().clear()


def test_every_measure_is_in_the_store_and_found_again(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("method=[dense,tempcache_paper]", "methods.tempcache_paper.cache.threshold=0.3")
    folders = redundancy.measure(config)
    rows = load(tmp_path / "redundancy")
    assert set(rows["method"]) == {"dense", "tempcache_paper"} and set(rows["weights"]) == {"random"}
    names = {name.partition("/")[0] for name in rows["metric"]}
    assert names <= set(METRICS)
    dense = rows[rows["method"] == "dense"]
    top = unfold(dense, "top_recall")
    assert top.loc[top["density"] == 1, "value"].to_numpy() == pytest.approx(1.0)
    assert 0 < top.loc[top["density"] == 0.1, "value"].max() < 1
    lags = unfold(dense, "lag_share").groupby(["of", "layer"])["value"].sum()
    assert lags.to_numpy() == pytest.approx(1, abs=0.01)
    assert len(unfold(dense, "pca")) == 3 * 2 * 48 * 3  # frames, queries and keys, tokens, components
    correct = unfold(dense, "correspondence")
    assert (
        set(correct["group"]) == {"all", "moved", "floor", "wall or ceiling"}
        and correct["value"].between(0, 1).all()
    )
    paper = rows[rows["method"] == "tempcache_paper"]
    errors = {
        name: unfold(paper, name).set_index("layer")["value"] for name in ("output_error", "error_bound")
    }
    assert (errors["output_error"] <= errors["error_bound"]).all() and errors["output_error"].max() > 0
    before = [(folder / "metrics.parquet").stat().st_mtime_ns for folder in folders]
    assert redundancy.measure(config) == folders
    assert [(folder / "metrics.parquet").stat().st_mtime_ns for folder in folders] == before


def test_prompts_are_measured_where_there_are_any(tiny: Tiny, tmp_path: Path) -> None:
    text = ["backbone=tiny_text", "data=noise", "source=noise", "frames=6", "method=[dense]"]
    redundancy.measure(tiny(*text))
    rows = load(tmp_path / "redundancy")
    assert unfold(rows, "prompt_padding_mass")["value"].between(0, 1).all()
    assert unfold(rows, "prompt_effective")["value"].between(1, 16).all()
    with pytest.raises(ValueError, match="no row of correspondence"):
        unfold(rows, "correspondence")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames=10", "whole number of 4-frame chunks"),
        ("looks=0", "at least 1"),
        ("pca_layer=7", "layers 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny: Tiny, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        redundancy.measure(tiny(override))


def test_names_carry_their_qualifiers() -> None:
    assert (
        qualified("key_above", space="raw", threshold=0.9, layer=3)
        == "key_above/space=raw/threshold=0.9/layer=3"
    )
