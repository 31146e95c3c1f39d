"""Reports on runs that were made earlier, and on what was recorded of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose
from omegaconf import DictConfig

from fastar.compare.command import clear_errors
from fastar.compare.job import compare
from fastar.compare.recorded import report
from fastar.compare.report_plots import minus_dense
from fastar.results import load, load_runs
from fastar.results.record import record_runs
from tests.experiments.conftest import command

Tiny = Callable[..., DictConfig]


def settings(**values: object) -> DictConfig:
    return compose("report", overrides=[f"{name}={value}" for name, value in values.items()])


def test_a_recorded_comparison_gives_the_same_report_elsewhere(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny("method=[dense,window,empty]", "protocols=[A,B]", "seeds=2", "videos=1"))
    [first] = (tmp_path / "compare").glob("report_*")
    kept = tmp_path / "kept"
    report(settings(runs=tmp_path / "compare", record=kept))
    names = {path.name for path in kept.iterdir() if path.is_dir()} - {"report"}
    assert names == {
        run.name for run in (tmp_path / "compare").iterdir() if not run.name.startswith("report")
    }
    files = {path.name for name in names for path in (kept / name).iterdir()}
    assert files == {"summary.json", "metrics.parquet"}, "numbers and settings, no videos"
    for name in ("results.md", "results.csv"):
        assert (kept / "report" / name).read_text() == (first / name).read_text()
    assert (kept / "report" / "fidelity_bytes_B.png").stat().st_size > 1000
    head, _, *lines = (kept / "report" / "summary_B.md").read_text().splitlines()
    assert head.startswith("| method | byte_share/end ↓ |") and "revisit_psnr (dB) ↑" in head
    assert [line.split(" | ")[0] for line in lines[:3]] == ["| dense", "| window", "| empty"]
    assert lines[-1].startswith("Protocol B; backbone tiny") and lines[-1].endswith(".")
    (kept / "report" / "results.md").unlink()
    report(settings(runs=kept))
    assert (kept / "report" / "results.md").read_text() == (first / "results.md").read_text()


def test_differences_are_taken_between_equal_budgets(tiny: Tiny, tmp_path: Path) -> None:
    common = ["method=[dense,window,random]", "protocols=[B]", "seeds=2", "videos=0"]
    for share in (0.15, 0.3):
        compare(tiny(*common, f"budget_share={share}"))
    report(settings(runs=tmp_path / "compare"))
    text = (tmp_path / "compare" / "report" / "results.md").read_text()
    for share in ("15%", "30%"):
        part = text.split(f"paired difference to window at {share}**\n\n")[1].split("\n\n")[0]
        lines = [line.split(" | ") for line in part.splitlines()[2:]]
        assert [line[0] for line in lines] == ["| dense", "| random"]
        assert lines[0][1] == "–" != lines[1][1], "dense's PSNR to itself is a cap"
    pages = {path.name: path.read_text() for path in (tmp_path / "compare" / "report").glob("*_B*.md")}
    assert set(pages) == {"summary_B.md", "summary_B_30.md", "differences_B.md", "differences_B_30.md"}
    assert "Protocol B; paired differences to window, mean" in pages["differences_B.md"]
    assert len({page.splitlines()[3] for page in pages.values()}) == 4


def test_the_gap_to_dense_is_taken_seed_by_seed() -> None:
    columns = ["method", "metric", "seed", "value"]
    scores = [("dense", 20.0), ("dense", 30.0), ("window", 19.0), ("window", 29.0)]
    rows = pd.DataFrame(
        [(method, "revisit_psnr", seed, value) for seed, (method, value) in zip((0, 1, 0, 1), scores, strict=True)]
        + [("window", "cache_bytes/end", 0, 7.0)],
        columns=columns,
    )  # fmt: skip
    gaps = minus_dense(rows, "revisit_psnr")
    assert gaps["method"].unique().tolist() == ["window"] and gaps["value"].tolist() == [-1.0, -1.0, 7.0]


def test_recording_keeps_what_is_done_and_takes_what_is_new(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny("method=[dense,empty]", "protocols=[B]", "seeds=1"))
    source, kept = tmp_path / "compare", tmp_path / "kept"
    first, *_ = sorted(record_runs(source, kept))
    assert record_runs([source, kept], kept)  # the same runs twice, one of them itself
    assert sum(path.is_dir() for path in kept.iterdir()) == len(load_runs(source))

    summary = source / first.name / "summary.json"
    record = json.loads(summary.read_text())
    summary.write_text(json.dumps(record | {"status": "failed"}))
    record_runs(source, kept)
    assert json.loads((first / "summary.json").read_text())["status"] == "done", (
        "a failure replaces no result"
    )
    (first / "summary.json").write_text(json.dumps(record | {"status": "failed"}))
    summary.write_text(json.dumps(record))
    record_runs(source, kept)
    assert json.loads((first / "summary.json").read_text())["status"] == "done"


def test_what_clocks_measured_can_be_left_out(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny("method=[dense,window]", "protocols=[C]", "seeds=1"))
    source, kept = tmp_path / "compare", tmp_path / "kept"
    record_runs(source, kept, timings=False)
    whole, rows = load(source), load(kept)
    timed = {"chunk_s", "fps/steady", "fps_commit/steady", "latency_p50/steady", "speedup/dense/steady"}
    gone = set(whole["metric"]) - set(rows["metric"])
    assert timed <= gone and not gone & {"psnr", "cache_bytes", "peak_allocated"}
    shared = whole[whole["metric"].isin(rows["metric"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, shared, check_exact=True)
    report(settings(runs=kept))
    assert "fps" not in (kept / "report" / "results.md").read_text()


def test_means_of_clips_give_the_same_tables_as_their_chunks(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny("method=[dense,annsa,window]", "protocols=[B,C]", "seeds=2", "batch=2"))
    reports = {}
    for name, curves in (("whole", True), ("means", False)):
        report(settings(runs=tmp_path / "compare", record=tmp_path / name, curves=curves))
        reports[name] = (tmp_path / name / "report" / "results.md").read_text()
    assert reports["means"] == reports["whole"]
    rows = load(tmp_path / "means")
    assert set(rows.loc[rows["chunk"].notna(), "metric"]) == {
        "cache_bytes",
        "cache_slots",
        "byte_share",
        "slot_share",
    }
    sizes = {name: sum(p.stat().st_size for p in (tmp_path / name).rglob("*.parquet")) for name in reports}
    assert sizes["means"] < sizes["whole"]


def test_a_summary_leaves_out_what_all_methods_share(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing is bounded: no columns for memory, one for the work. Else the other way round."""
    compare(tiny("method=[dense,annsa]", "protocols=[B]", "seeds=1"))
    compare(tiny("method=[dense,annsa,window]", "protocols=[B]", "seeds=1", "name=bounded"))
    heads = {}
    for name in ("compare", "bounded"):
        report(settings(runs=tmp_path / name))
        heads[name] = (tmp_path / name / "report" / "summary_B.md").read_text().splitlines()[0]
        against = {
            kind: tmp_path / name / "report" / f"{kind}_B.png" for kind in ("fidelity_bytes", "pairs_psnr")
        }
        assert against["fidelity_bytes"].exists() == (name == "bounded")
        assert against["pairs_psnr"].exists() == (name == "compare")
    assert "density" in heads["compare"] and "share" not in heads["compare"]
    assert "density" not in heads["bounded"] and "slot_share" in heads["bounded"]


def test_runs_that_are_not_there_or_not_finished(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs match"):
        record_runs(tmp_path / "nowhere", tmp_path / "kept")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"run_id": "run", "status": "running"}))
    with pytest.raises(ValueError, match="has finished: nothing to record"):
        record_runs(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(SystemExit, match="error: no runs match"), clear_errors():
        report(settings(runs=tmp_path / "nowhere"))


def test_runs_that_say_nothing_together_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for frames in (8, 12):
        compare(tiny("method=[dense]", "protocols=[C]", "videos=0", f"frames={frames}", f"name=of_{frames}"))
    report(settings(runs=tmp_path / "of_8"))
    with pytest.raises(
        ValueError, match=r"these runs differ in frames \(12 and 8\): report on each kind by itself"
    ):
        report(settings(runs=f"[{tmp_path}/of_8,{tmp_path}/of_12]", output=tmp_path / "both"))
    assert not list((tmp_path / "both").iterdir())


def test_a_batch_that_fails_is_one_short_line(tiny: Tiny, tmp_path: Path) -> None:
    quick = ["protocols=[B]", "methods.window.cache.budget_share=0.01", "frames=8", "videos=0"]
    compare(tiny("method=[dense,window,empty]", "seeds=[4,5,6]", "batch=3", *quick))
    [folder] = (tmp_path / "compare").glob("report_*")
    text = (folder / "results.md").read_text()
    assert "| window | 4-6 | the cache budget of" in text


def test_the_command_leaves_nothing_but_its_report(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny("method=[dense,window]", "protocols=[B]", "seeds=1", "frames=8", "videos=0"))
    here = tmp_path / "elsewhere"
    here.mkdir()
    done = command("report.py", f"runs={tmp_path / 'compare'}", folder=here)
    assert done.returncode == 0, done.stderr
    assert "psnr (dB) ↑" in done.stdout and not list(here.iterdir())
    assert (tmp_path / "compare" / "report" / "results.md").exists()
