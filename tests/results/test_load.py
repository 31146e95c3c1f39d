"""One loader from folders to a tidy table, and tables with spread from there."""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from fastar.results import RunStore, load, load_runs
from fastar.results.plots import plot_curves, plot_frontier
from fastar.results.record import record_runs
from fastar.results.rows import to_table
from fastar.results.tables import differences, failures, pivot, spread, to_markdown, to_rich


def row(metric: str, value: float, chunk: int | None = 0, clip: int | None = None) -> dict[str, object]:
    frame = None if chunk is None else 4 * chunk
    return {
        "metric": metric,
        "chunk": chunk,
        "frame": frame,
        "clip": clip,
        "value": value,
        "unit": "dB",
        "time": 0.0,
    }


def synthetic(root: Path, number: int, *, chunks: int = 20) -> None:
    folder = root / f"run{number:03d}"
    folder.mkdir(parents=True)
    rows = [
        row(metric, number + chunk / 100, chunk) for chunk in range(chunks) for metric in ("psnr", "ssim")
    ]
    pq.write_table(to_table(rows), folder / "metrics.parquet")
    summary = {
        "run_id": folder.name, "status": "done", "experiment": root.name, "seed": number % 10,
        "labels": {"method": f"m{number // 10}"}, "config": {"cache": {"budget_frames": number}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def test_two_hundred_runs_load_fast(tmp_path: Path) -> None:
    for number in range(200):
        synthetic(tmp_path / "sweep", number)
    start = time.perf_counter()
    rows = load(tmp_path / "**", config=["cache.budget_frames", "cache.absent"])
    assert time.perf_counter() - start < 2
    assert len(rows) == 200 * 40 and rows["run_id"].nunique() == 200
    one = rows[(rows["run_id"] == "run123") & (rows["metric"] == "psnr") & (rows["chunk"] == 7)]
    assert (
        one["value"].item() == 123.07
        and one["cache.budget_frames"].item() == 123
        and one["method"].item() == "m12"
    )
    assert rows["cache.absent"].isna().all()
    assert {name: str(kind) for name, kind in rows.dtypes.items() if name in ("chunk", "frame", "clip", "value")} == {
        "chunk": "Int64", "frame": "Int64", "clip": "Int64", "value": "float64",
    }  # fmt: skip


def test_patterns(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthetic(tmp_path / name, 1)
        synthetic(tmp_path / name, 2)
    assert load_runs(tmp_path)["run_id"].tolist() == ["run001", "run002"] * 2
    assert len(load_runs(f"{tmp_path}/a/*")) == 2
    assert len(load_runs(f"{tmp_path}/*/run001")) == 2
    assert len(load_runs([tmp_path / "a" / "run001", tmp_path / "a"])) == 2, "a run found twice counts once"
    (tmp_path / "latest").symlink_to("a")
    assert len(load_runs(tmp_path)) == 4, "links lead to the same runs"
    with pytest.raises(ValueError, match="no runs match"):
        load(tmp_path / "c")
    odd = tmp_path / "é [v1]"
    synthetic(odd, 1)
    assert len(load_runs(odd)) == 1, "a folder's name is no pattern"


def test_copies_and_other_versions_are_refused(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    with pytest.raises(ValueError, match=r"is the same run as .* leave one of them out"):
        load(tmp_path)
    path = tmp_path / "backup" / "run001" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": "new", "schema_version": 2}))
    with pytest.raises(ValueError, match="several schema versions"):
        load(tmp_path)


def test_a_damaged_table_is_one_sentence(tmp_path: Path) -> None:
    synthetic(tmp_path, 1)
    table = tmp_path / "run001" / "metrics.parquet"
    table.write_bytes(table.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"metrics\.parquet is damaged .*: remove the folder"):
        load(tmp_path)


def test_done_without_its_table_is_an_error(tmp_path: Path) -> None:
    synthetic(tmp_path, 1)
    (tmp_path / "run001" / "metrics.parquet").unlink()
    with pytest.raises(ValueError, match="marked as done but has no"):
        load(tmp_path)


@pytest.fixture
def compared(tmp_path: Path) -> pd.DataFrame:
    """Three methods: two on four seeds, where b = a + 1 in every seed, and one that fails."""
    store = RunStore(tmp_path, "compare")
    for seed in range(4):
        for method, offset in (("b", 1.0), ("a", 0.0)):
            with store.open({"method": method}, seed=seed, labels={"method": method}) as run:
                for chunk in range(2):
                    run.log({"psnr": 30 + 2 * seed + chunk + offset}, chunk=chunk, frame=4 * chunk)
                run.log({"cache_bytes": 2.0**30 * (2 if method == "b" else 1)})
    with pytest.raises(MemoryError), store.open({"method": "c"}, seed=0, labels={"method": "c"}):
        raise MemoryError("no room")
    return load(tmp_path)


def test_spread_is_over_seeds_not_chunks(compared: pd.DataFrame) -> None:
    stats = spread(compared, metrics=["psnr"]).set_index("method")
    assert stats["n"].tolist() == [4, 4] and set(stats.index) == {"a", "b"}
    assert stats.loc["a", "mean"] == pytest.approx(33.5)  # seeds 30.5, 32.5, 34.5, 36.5
    assert 30.5 <= stats.loc["a", "low"] < 33.5 < stats.loc["a", "high"] <= 36.5


def test_differences_are_paired(compared: pd.DataFrame) -> None:
    difference = differences(compared, baseline="a", metrics=["psnr"])
    assert difference[["method", "mean", "low", "high", "n"]].values.tolist() == [["b", 1.0, 1.0, 1.0, 4]]
    with pytest.raises(ValueError, match="choose one of"):
        differences(compared, baseline="z")


def test_missing_values_are_counted(compared: pd.DataFrame) -> None:
    chosen = (compared["method"] == "a") & (compared["seed"] == 0) & (compared["metric"] == "psnr")
    compared.loc[chosen, "value"] = float("nan")
    stats = spread(compared, metrics=["psnr"]).set_index("method")
    assert stats.loc["a", ["n", "missing"]].tolist() == [3, 1]
    assert differences(compared, baseline="a", metrics=["psnr"])["n"].item() == 3


def test_tables_as_text(compared: pd.DataFrame) -> None:
    table = pivot(spread(compared, metrics=["psnr", "cache_bytes"]))
    assert list(table.columns) == ["method", "psnr (dB) ↑", "cache_bytes (MiB) ↓"]
    lines = to_markdown(table).splitlines()
    assert lines[1] == "| :-- | --: | --: |" and len(lines) == 4
    cells = table.set_index("method").loc["a"]
    assert cells["cache_bytes (MiB) ↓"] == "1,024.0" and cells["psnr (dB) ↑"].startswith("33.50 [")
    assert to_rich(table, title="t").row_count == 2
    assert failures(compared).values.tolist() == [["c", 0, "no room"]]


def test_plots_are_pictures(compared: pd.DataFrame, tmp_path: Path) -> None:
    from PIL import Image

    for path in (
        plot_curves(compared, "psnr", tmp_path / "plots/curve.png"),
        plot_frontier(compared, "cache_bytes", "psnr", tmp_path / "plots/frontier.png"),
    ):
        assert len(set(Image.open(path).convert("RGB").get_flattened_data())) > 20
    with pytest.raises(ValueError, match="no rows of fps"):
        plot_curves(compared, "fps", tmp_path / "x.png")


def test_runs_of_single_seeds_are_recorded_as_one_of_several_clips(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "outputs", "sweep")
    for method in ("one", "two"):
        for seed in (3, 1):
            labels = {"method": method}
            with store.open({"m": method}, seed=seed, checkpoint_sha256="abc", labels=labels) as run:
                run.log({"psnr": 10 * seed + len(method)}, chunk=0, frame=4)
    kept = record_runs(tmp_path / "outputs", tmp_path / "kept", together=True)
    folders = {path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()}
    assert len(kept) == 2 and folders == {path.name for path in kept}
    apart, rows = load(tmp_path / "outputs"), load(tmp_path / "kept")
    assert set(rows["seed"]) == {(1, 3)} and sorted(rows["value"]) == sorted(apart["value"])
    first = rows[(rows["method"] == "one") & (rows["clip"] == 0)]
    assert first["value"].tolist() == [13.0] and first["frame"].tolist() == [4]
    pd.testing.assert_frame_equal(spread(rows), spread(apart), check_like=True)
    again = record_runs(tmp_path / "outputs", tmp_path / "kept", together=True)
    assert sorted(again) == sorted(kept) and len(load(tmp_path / "kept")) == len(rows)


def test_what_costs_nothing_is_shown_where_the_axis_does_not_reach_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others at one cost; and what all are held against is a line across, whatever it costs."""
    drawn = []
    monkeypatch.setattr("fastar.results.plots._save", lambda figure, axes, path: drawn.append(axes) or path)
    costs = {"window": 10.0, "tempcache": 10.2, "empty": 0.0, "dense_reference": 80.0}
    rows = pd.DataFrame(
        {"method": method, "metric": metric, "seed": 0, "clip": 0, "value": value, "unit": ""}
        for method, cost in costs.items()
        for metric, value in (("cache_bytes", 2**20 * cost), ("psnr", 30.0))
    )
    for methods in (["window", "tempcache", "empty"], list(costs)):
        chosen = rows[rows["method"].isin(methods)]
        plot_frontier(chosen, "cache_bytes", "psnr", tmp_path / "a.png", across=("dense_reference",))
        lines = {line.get_label(): line for line in drawn[-1].get_lines()}
        assert {name for name, line in lines.items() if line.get_linestyle() == ":"} == set(methods) & {
            "empty",
            "dense_reference",
        }
