"""Comparisons with fused or captured passes: runs of their own, held against the plain dense rollout."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from fastar.backbones.wan.fused import Execution
from fastar.backbones.wan.transformer import CausalWanTransformer
from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.session import open_session
from fastar.compare.variants import variant_names
from fastar.results import load, load_runs
from tests.experiments.conftest import ROOT, values

Tiny = Callable[..., DictConfig]


def run(config: DictConfig) -> Comparison:
    comparison = Comparison(config, open_session(config))
    comparison.run()
    return comparison


def planned(config: DictConfig) -> dict[tuple[str, str, str | None], str]:
    """Run ids by method, protocol and what the label `passes` says."""
    runs = Comparison(config, open_session(config)).planned()
    return {(run["method"], run["protocol"], run.get("passes")): run["run_id"] for run in runs}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of fused passes, which the CPU would take minutes for: velocities a little off."""

    def apply(self: Execution, transformer: CausalWanTransformer) -> None:
        with torch.no_grad():
            transformer.head.head.bias.fill_(1e-3 if self.fused else 0)

    monkeypatch.setattr(Execution, "apply", apply)


def test_fused_passes_are_runs_of_their_own(tiny: Tiny, tmp_path: Path, fused: None) -> None:
    asked = ("method=[dense,window]", "prefill_frames=4", "frames=8", "seeds=2", "batch=2", "videos=0")
    how, reference = "fused, linears=model", ("dense", "C", None)
    plain = planned(tiny(*asked, "protocols=[B,C]"))
    run(tiny(*asked, "protocols=[C]", "name=plain"))
    config = tiny(*asked, "protocols=[B,C]", "execution.fused=true")
    own = planned(config)
    assert set(own) == {reference, *((name, at, how) for name in ("dense", "window") for at in "BC")}
    assert own[reference] == plain[reference] and len({*plain.values(), *own.values()}) == 8
    made = run(config)
    rows, before = load(tmp_path / "compare"), load(tmp_path / "plain")
    dense = rows[(rows["method"] == "dense") & (rows["protocol"] == "C")]
    exact = values(before, "psnr/truth", method="dense")
    assert values(dense[dense["passes"].isna()], "psnr/truth") == exact
    assert values(dense[dense["passes"].notna()], "psnr/truth") != exact
    for protocol in "BC":  # held against the plain rollout, dense itself too
        errors = values(rows, "latent_error", method="dense", protocol=protocol)
        assert len(errors) == 4 and min(errors) > 1e-5, protocol
    runs = load_runs(tmp_path / "compare", config=["execution.fused", "capture"])
    assert runs["execution.fused"].isna().sum() == 1 and (runs["execution.fused"] == True).sum() == 4  # noqa: E712
    record = runpy.run_path(str(ROOT / "scripts/fidelity_record.py"))["record"](str(tmp_path / "compare"))
    [line] = [row for row in record["rows"] if (row["method"], row["protocol"]) == ("window", "B")]
    scores = values(rows, "psnr", method="window", protocol="B")
    assert line["passes"] == how and line["psnr"][0] == pytest.approx(sum(scores) / 4, abs=1e-4)
    assert record["card"]["clips"] == 2 and record["card"]["backbone"] == "tiny"
    names = variant_names(made.runs, list(made.methods)).values()
    assert {*names} == {"dense", f"dense passes={how}", "window"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["capture=true"], "captured on CUDA alone: leave capture=true out"),
        (["execution.linears=fp8"], "linears=fp8 needs fused=true"),
        (["execution.linears=int3"], "linears must be one of model, fp8"),
        (["execution.linears=fp8", "execution.fused=true"], "linears=fp8 needs a bfloat16 model"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is(
    tiny: Tiny, overrides: list[str], message: str
) -> None:
    config = tiny("method=[dense]", "protocols=[B]", *overrides)
    with pytest.raises(ValueError, match=message):
        Comparison(config, open_session(config))


@pytest.mark.gpu
def test_captured_passes_on_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    asked = ("method=[dense,window,tempcache]", "device=cuda", "frames=24", "videos=0", "budget_share=0.3")
    with pytest.raises(ValueError, match="protocol A looks at every attention call"):
        config = tiny(*asked, "protocols=[A]", "capture=true")
        Comparison(config, open_session(config))
    assert compare(tiny(*asked, "protocols=[B,C]", "name=plain"))
    assert compare(tiny(*asked, "protocols=[B,C]", "capture=true", "execution.fused=true", "name=captured"))
    plain, captured = (load(tmp_path / name) for name in ("plain", "captured"))
    for method in ("window", "tempcache"):
        scores = [values(rows, "psnr", method=method, protocol="B") for rows in (plain, captured)]
        # rounding is all that differs where the method is still equal to dense: 100 dB, the cap, or less
        below = [[min(score, 60.0) for score in each] for each in scores]
        assert below[1] == pytest.approx(below[0], abs=1.0), method
    assert not values(captured, "density", method="window") and values(plain, "density", method="window")
