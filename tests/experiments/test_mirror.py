"""What a comparison stores is what W&B gets, offline."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose
from omegaconf import DictConfig

from fastar.compare.job import compare
from fastar.compare.recorded import report
from fastar.results import load
from fastar.results.sinks.wandb_sink import worker
from tests.results.wandb_offline import read


def test_every_stored_number_is_in_the_offline_run(tiny: Callable[..., DictConfig], tmp_path: Path) -> None:
    settings = ["method=[dense,window]", "protocols=[A,C]", "seeds=2", "batch=2", "frames=8"]
    compare(tiny(*settings, "logger=wandb", "logger.tags=[mine]"))
    assert worker().flush(60)
    rows = load(tmp_path)
    runs = [path.parent for path in (tmp_path / "compare").glob("*/metrics.parquet")]
    assert len(runs) == 4
    for folder in runs:
        found, mine = read(folder), rows[rows["run_id"] == folder.name]
        lines = {line["chunk"]: line for line in found.chunks()}
        for row in mine.itertuples():
            name = row.metric if row.clip is pd.NA else f"{row.metric}/clip{row.clip}"
            where = found.summary if row.chunk is pd.NA else lines[row.chunk]
            assert where[name] == pytest.approx(row.value, rel=1e-12, nan_ok=True), name
            assert row.frame is pd.NA or where["frame"] == row.frame
        assert (found.run.run_group, found.run.job_type) == ("compare", mine["method"].iloc[0])
        assert set(found.run.tags) == {"mine", f"protocol {mine['protocol'].iloc[0]}", "tiny"}
        means = mine[(mine["metric"] == "psnr/truth") & mine["chunk"].notna()]["value"]
        assert found.summary["psnr/truth/mean"] == pytest.approx(means.mean())
    assert any("speedup/dense" in line for folder in runs for line in read(folder).chunks())

    [folder] = (tmp_path / "compare").glob("report_*")
    shown = read(folder)
    assert shown.run.job_type == "comparison"
    kinds = [path.suffix for path in folder.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]
    assert kinds.count(".png") >= 4 and kinds.count(".mp4") == 1
    assert kinds.count(".json") == (folder / "results.md").read_text().count("\n**")


def kinds_of_media(folder: Path) -> set[str]:
    return {path.suffix for path in folder.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()}


def test_runs_that_are_there_can_be_mirrored_later(tiny: Callable[..., DictConfig], tmp_path: Path) -> None:
    """Recorded elsewhere, without a logger: the same numbers, and the report, as an offline run."""
    compare(tiny("method=[dense,window]", "protocols=[C]", "seeds=2", "batch=2", "frames=8", "videos=1"))
    overrides = [
        f"runs={tmp_path}/compare",
        f"record={tmp_path}/kept",
        f"paths.outputs={tmp_path}/out",
        "stills=2",
    ]
    report(compose("report", overrides=[*overrides, "logger=wandb"]))
    assert worker().flush(60)
    rows = load(tmp_path / "kept")
    *folders, shown = sorted((tmp_path / "out" / "mirrored" / "compare").iterdir())
    assert len(folders) == 2 == rows["run_id"].nunique()
    for folder in folders:
        found, mine = read(folder), rows[rows["run_id"] == folder.name]
        lines = {line["chunk"]: line for line in found.chunks()}
        assert len(found.chunks()) == mine["chunk"].nunique(), "one line a chunk"
        for row in mine.itertuples():
            name = row.metric if row.clip is pd.NA else f"{row.metric}/clip{row.clip}"
            where = found.summary if row.chunk is pd.NA else lines[row.chunk]
            assert where[name] == pytest.approx(row.value, rel=1e-12, nan_ok=True), name
        assert kinds_of_media(folder) == {".mp4"}
    report(
        compose("report", overrides=[f"runs={tmp_path}/kept", f"paths.outputs={tmp_path}/2", "logger=wandb"])
    )
    assert worker().flush(60)
    *folders, _ = sorted((tmp_path / "2" / "mirrored" / "compare").iterdir())
    assert [kinds_of_media(folder) for folder in folders] == [{".png"}] * 2
    assert (read(shown).run.run_group, read(shown).run.job_type) == ("compare", "comparison")
