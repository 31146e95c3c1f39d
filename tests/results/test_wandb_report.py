"""The report on an ablation is built without a network; what is pushed is what was described."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastar.metrics.names import METRICS
from fastar.results import RunStore
from fastar.results.wandb_report import INSTALL, PANELS, build, report_on

missing = importlib.util.find_spec("wandb_workspaces") is None
needs_workspaces = pytest.mark.skipif(missing, reason="needs the extra wandb-report")


def pushed(report: Any) -> dict[str, Any]:
    """What `save` would send."""
    spec: dict[str, Any] = json.loads(
        report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    return spec


@needs_workspaces
def test_a_report_describes_all_panels_by_method() -> None:
    spec = pushed(build("frontier", project="fastar", entity="team", protocols=["B", "C"]))
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 3
    for grid, protocol in zip(grids, "BC", strict=False):
        [runs] = grid["runSets"]
        assert [key["name"] for key in runs["grouping"]] == ["jobType"]
        filters = json.dumps(runs["filters"])
        assert "frontier" in filters and f'"{protocol}"' in filters and "comparison" in filters
        panels = grid["panelBankSectionConfig"]["panels"]
        shown = {name for panel in panels for name in panel["config"]["metrics"]}
        assert shown == {*PANELS[protocol][1], *PANELS[protocol][2]}
        places = [tuple(panel["layout"].values()) for panel in panels]
        assert len(set(places)) == len(places)
        lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
        assert {line["xAxis"] for line in lines} == {"frame"} and len(lines) == len(PANELS[protocol][1])


@pytest.mark.skipif(not missing, reason="wandb-workspaces is installed")
def test_without_the_package_one_sentence_says_what_to_install() -> None:
    with pytest.raises(ValueError, match=re.escape(INSTALL)):
        build("frontier", project="fastar", entity="team", protocols=["C"])


def test_panels_show_metrics_that_are_logged() -> None:
    names = {name.split("/")[0] for _, *parts in PANELS.values() for part in parts for name in part}
    assert names <= METRICS.keys()


def test_wrong_arguments_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fastar' is not ENTITY/PROJECT"):
        report_on(tmp_path, target="fastar")
    with pytest.raises(ValueError, match="no runs match"):
        report_on(tmp_path, target="team/fastar")
    for experiment in ("one", "two"):
        with RunStore(tmp_path, experiment).open({}, seed=0, labels={"method": "dense"}) as run:
            run.log({"psnr": 1.0}, chunk=0)
    with pytest.raises(ValueError, match="several experiments"):
        report_on(tmp_path, target="team/fastar")
    with pytest.raises(ValueError, match="belong to no comparison"):
        report_on(tmp_path / "one", target="team/fastar")
