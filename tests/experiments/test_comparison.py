"""Runs of a comparison are done once, resumed to the same numbers, and fail alone."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from fastar.compare.command import check_choices, clear_errors
from fastar.compare.comparison import Comparison
from fastar.compare.job import compare
from fastar.compare.methods import budgeted, resolved
from fastar.compare.report import per_seed
from fastar.compare.session import open_session
from fastar.results import load, load_runs
from fastar.results.loading import FAILURE
from tests.experiments.conftest import ROOT, values

Tiny = Callable[..., DictConfig]
TIMED = ("_s", "fps", "latency", "peak", "speedup")


def run(config: DictConfig) -> Comparison:
    comparison = Comparison(config, open_session(config))
    comparison.run()
    return comparison


def untimed(folder: Path) -> pd.DataFrame:
    """What must not depend on when and how often a run was started."""
    rows = load(folder)
    rows = rows[[not any(part in name for part in TIMED) for name in rows["metric"]]]
    columns = ["method", "protocol", "metric", "chunk", "frame", "clip", "value"]
    return rows[columns].sort_values(columns[:-1]).reset_index(drop=True)


def test_protocols_agree_where_they_must(tiny: Tiny, tmp_path: Path) -> None:
    """Dense against itself is exact in every protocol, and so is a window that forgets nothing."""
    config = tiny(
        "method=[dense,window,empty]",
        "protocols=[A,B,C]",
        "methods.window.cache.budget_share=4",
        "seeds=[3]",
        "frames=8",
    )
    comparison = run(config)
    rows = load(tmp_path)
    assert set(rows["seed"]) == {3} and len(comparison.runs) == 9
    for protocol in "ABC":
        exact = values(rows, "psnr", method="window", protocol=protocol)
        assert exact == [100.0] * 2, protocol
        forgetful = values(rows, "psnr", method="empty", protocol=protocol)
        assert len(forgetful) == 2 and max(forgetful) < 90, protocol
    assert values(rows, "psnr", method="dense", protocol="B") == [100.0] * 2
    assert values(rows, "psnr", method="dense", protocol="C") == []  # it is the reference
    assert values(rows, "density", method="dense", protocol="C") == [1.0] * 2
    assert values(rows, "slot_share", method="dense", protocol="C") == [1.0] * 2
    assert max(values(rows, "density", method="empty")) < 0.3
    for metric, value in (("recall", 1.0), ("output_error", 0.0)):  # of the last chunk, in protocol A alone
        for method in ("dense", "window"):
            assert values(rows, metric, method=method) == pytest.approx([value], abs=1e-5)
        assert values(rows, metric, method="empty") != pytest.approx([value], abs=0.01)
    frames = rows.loc[(rows["metric"] == "chunk_s") & (rows["method"] == "dense"), "frame"]
    assert frames.tolist() == [16, 20]
    assert len(values(rows, "revisit_psnr", method="empty")) == 3  # one a protocol


def test_speed_up_is_over_dense_of_the_same_seeds(tiny: Tiny, tmp_path: Path) -> None:
    for method, seed in (("window", 0), ("dense", 0), ("dense", 1), ("empty", 1), ("empty", 2)):
        run(tiny(f"method=[{method}]", "protocols=[C]", f"seeds=[{seed}]", "warmup_chunks=1"))
    rows = load(tmp_path)
    for seed, method in (
        (0, "window"),
        (0, "dense"),
        (1, "dense"),
        (2, "empty"),
    ):  # dense was not there, or is it
        part = rows[(rows["seed"] == seed) & (rows["method"] == method)]
        assert len(part) and not part["metric"].str.startswith("speedup").any(), (seed, method)
    mine, dense = (rows[(rows["seed"] == 1) & (rows["method"] == method)] for method in ("empty", "dense"))
    walls = zip(values(dense, "chunk_s"), values(mine, "chunk_s"), strict=True)
    assert values(mine, "speedup/dense") == pytest.approx([slow / fast for slow, fast in walls])
    ratio = values(mine, "fps/steady")[0] / values(dense, "fps/steady")[0]
    assert values(mine, "speedup/dense/steady") == pytest.approx([ratio])
    run(tiny("method=[window]", "protocols=[C]", "seeds=[0]", "warmup_chunks=2"))  # dense had other settings
    assert not load(tmp_path).query("method == 'window'")["metric"].str.startswith("speedup").any()
    config = tiny("method=[dense,empty]", "protocols=[C]", "seeds=[1]", "warmup_chunks=1")
    compare(config)
    [report] = (tmp_path / "compare").glob("report_*")
    assert "| speedup/dense/steady ↑ |" in (report / "results.md").read_text()


def test_equal_bytes_by_construction(tiny: Tiny, tmp_path: Path) -> None:
    names = "tempcache,tempcache_int8,window,sink_recent,random,key_norm,fast_ar"
    config = tiny(f"method=[{names}]", "protocols=[C]", "budget_share=0.13", "frames=8")
    assert budgeted(config.methods) == set(names.split(","))
    run(config)
    rows = load(tmp_path)
    assert (rows["budget_share"] == 0.13).all() and not (rows["metric"] == FAILURE).any()
    last = rows[(rows["metric"] == "cache_bytes") & (rows["chunk"] == 1)]["value"]
    budget = 0.13 * 64 * 48 * 2 * 2 * 64 * 2  # share, frames, tokens, layers, k and v, dim, bytes
    assert len(last) == 7 and (last <= budget).all() and (last > 0.97 * budget).all()


def test_interrupted_and_resumed_to_the_same_numbers(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ("method=[dense,tempcache]", "protocols=[C]", "save_every=1")
    run(tiny(*arguments, "name=whole"))

    chunks = 0

    def interrupt(done: int) -> None:
        nonlocal chunks
        chunks += done
        if chunks == 6:  # in the second run, with two of its four chunks made
            raise KeyboardInterrupt

    config = tiny(*arguments, "name=parts")
    comparison = Comparison(config, open_session(config), advance=interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    assert load_runs(tmp_path / "parts").set_index("method")["status"].to_dict() == {
        "dense": "done",
        "tempcache": "running",
    }
    made = 0

    def count(done: int) -> None:
        nonlocal made
        made += done

    Comparison(config, open_session(config), advance=count).run()
    assert made == 8
    pd.testing.assert_frame_equal(untimed(tmp_path / "parts"), untimed(tmp_path / "whole"), check_exact=True)


def test_a_batch_is_the_same_videos(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ("method=[dense,window]", "protocols=[B,C]", "seeds=2", "frames=8")
    run(tiny(*arguments, "name=one"))
    run(tiny(*arguments, "name=two", "batch=2"))
    found = {}
    for name in ("one", "two"):
        rows = per_seed(load(tmp_path / name))
        rows = rows[rows["metric"].isin(["psnr", "revisit_psnr", "latent_error"])]
        found[name] = rows.set_index(["method", "protocol", "metric", "chunk", "seed"])["value"].sort_index()
    assert len(found["one"]) and found["one"].index.equals(found["two"].index)
    finite = found["one"] < 99  # equal up to rounding, which means nothing above
    torch.testing.assert_close(
        torch.tensor(found["two"][finite].to_numpy()), torch.tensor(found["one"][finite].to_numpy()),
        rtol=0.02, atol=1e-4,
    )  # fmt: skip


@pytest.mark.gpu
def test_every_method_runs_on_a_gpu_as_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    names = [path.stem for path in sorted((ROOT / "conf/method").glob("*.yaml"))]
    found = {}
    for place in ("cpu", "cuda"):
        settings = ["protocols=[A,B,C]", "videos=0", f"device={place}", f"name={place}"]
        run(tiny(f"method=[{','.join(names)}]", *settings))
        rows = load(tmp_path / place)
        assert not (rows["metric"] == FAILURE).any(), place
        found[place] = rows.set_index(["method", "protocol", "metric", "chunk", "seed"])["value"].sort_index()
    # merges and draws of lots may turn on rounding, which the paper's form, without a budget, shows in its bytes
    everyone = {name: 0.02 if name.startswith("tempcache_paper") else 0 for name in names}
    for method, tolerance in everyone.items():
        for metric in ("cache_bytes", "cache_slots"):
            cpu, cuda = (found[place].loc[(method, "B", metric)].to_numpy() for place in ("cpu", "cuda"))
            assert len(cpu) and cuda == pytest.approx(cpu, rel=tolerance), (method, metric)
    for method in ("empty", "window"):  # below 60 dB, where the GPU's TF32 products do not show
        cpu, cuda = (found[place].loc[(method, "B", "psnr")].to_numpy() for place in ("cpu", "cuda"))
        assert cuda == pytest.approx(cpu, abs=0.2), method


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_failing_method_is_a_row_and_the_others_go_on(tiny: Tiny, tmp_path: Path, protocol: str) -> None:
    config = tiny(
        "method=[dense,window,empty]",
        f"protocols=[{protocol}]",
        "methods.window.cache.budget_share=0.01",
        "frames=8",
    )
    said: list[str] = []
    Comparison(config, open_session(config), say=said.append).run()
    runs = load_runs(tmp_path)
    status = runs[runs["protocol"] == protocol].set_index("method")["status"].to_dict()
    assert status == {"dense": "done", "window": "failed", "empty": "done"}
    rows = load(tmp_path)
    [reason] = rows.loc[rows["metric"] == FAILURE, "reason"]
    assert "budget" in reason and "give at least" in reason
    assert any("window" in line and "budget" in line for line in said)


def test_nan_is_a_failed_run_with_one_sentence(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("method=[dense,window]", "protocols=[B,C]")
    session = open_session(config)
    with torch.no_grad():
        session.backbone.transformer.blocks[0].ffn[0].weight[0, 0] = float("nan")
    Comparison(config, session).run()
    rows = load(tmp_path)
    failed = rows[rows["metric"] == FAILURE].set_index(["method", "protocol"])["reason"]
    assert len(failed) == 4
    assert "NaN or infinity in the prefill pass of frames 0 to 3" in failed["window", "C"]
    assert "no dense trajectory" in failed["window", "B"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocols=[D]", "A, B, C"),
        ("source=nowhere", "returns, heldout"),
        ("dtype=float8", "float32, bfloat16"),
        ("frames=6", "4-frame chunks: ask for 8"),
        ("seeds=[1,1]", "different numbers"),
        ("batch=0", "at least 1"),
        ("checkpoint=missing_folder", "there is no checkpoint missing_folder"),
        ("method=[window]", "need the method 'dense'"),
        ("engine.name=warp", "choose one of auto"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(tiny: Tiny, override: str, message: str) -> None:
    config = tiny("protocols=[B]", override)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("[", r"\[")):
        Comparison(config, open_session(config))


def test_settings_of_methods_that_are_not_asked_for_are_left_out(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """An experiment sets something of a method, and method=[...] names others."""
    mine = "+methods.tempcache.cache.threshold=0.8"
    config = tiny("protocols=[B]", "method=[dense,window]", mine)
    comparison = Comparison(config, open_session(config))
    assert list(comparison.methods) == ["dense", "window"] and comparison.store.budgeted == {"window"}
    assert "method=[...] does not name them: tempcache" in caplog.text
    with pytest.raises(ValueError, match="names none of tempcache"):
        resolved(tiny("protocols=[B]", "method=[empty]", "~methods.empty", mine))


def test_unknown_method_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        SystemExit, match=r"unknown method 'tempcach': choose from annca, .*dense, .*tempcache, "
    ):
        check_choices(["method=[dense,tempcach]", "seeds=2"], ROOT / "conf/method")
    check_choices(["method=dense", "method=[tempcache,window]"], ROOT / "conf/method")


def test_an_error_ends_the_command_with_one_line(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    sentence = r"^error: cannot write to .*: choose another place with paths\.outputs=\.\.\.$"
    with pytest.raises(SystemExit, match=sentence), clear_errors():
        compare(tiny(f"paths.outputs={tmp_path}/file"))
    with pytest.raises(SystemExit, match="the same command goes on"), clear_errors():
        raise KeyboardInterrupt
