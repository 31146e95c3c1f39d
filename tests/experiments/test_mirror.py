"""What a comparison stores is what W&B gets, offline."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig

from fastar.compare.job import compare
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
