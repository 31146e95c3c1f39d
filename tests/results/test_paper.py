"""The paper's tables, and ours beside them."""

from __future__ import annotations

import pandas as pd
import pytest

from fastar.results.paper import beside, latency_ratios, measured, printed


@pytest.mark.parametrize(("number", "lines"), [(1, 15), (2, 15), (3, 12), (4, 14)])
def test_tables_are_transcribed_in_full(number: int, lines: int) -> None:
    table = printed(number)
    assert len(table) == lines and not table.isna().any(axis=None)
    for name in ("density", "recall", "ssim", "lpips"):
        if name in table:
            assert pd.to_numeric(table[name], errors="coerce").dropna().between(0, 1).all()


def test_a_table_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"table 9 of the paper is not in .*: there are table_1, table_2"):
        printed(9)


def test_a_line_has_means_intervals_and_how_many_clips() -> None:
    rows = pd.DataFrame(
        {"metric": "psnr", "value": [30.0, 32.0], "seed": [(0, 1)] * 2, "clip": [0, 1], "method": "window"}
    )
    assert measured(rows, ["psnr", "ssim"]) == {"psnr": "31.00 [30.00, 32.00]", "clips": "2"}
    with pytest.raises(ValueError, match="no rows of this line are recorded"):
        measured(rows.iloc[:0], ["psnr"])


def test_ours_follow_the_papers_line_of_their_name() -> None:
    paper = pd.DataFrame({"method": ["dense", "AnnSA"], "psnr": ["–", "25.7"], "VBench": ["84", "83"]})
    ours = [
        ("window", {"method": "window", "psnr": "30"}),
        ("AnnSA", {"method": "AnnSA, ours", "slots": "1", "protocol": "A"}),
    ]
    table = beside(paper, ours)
    assert list(table.columns) == ["method", "protocol", "psnr", "VBench", "slots"]
    assert list(table["method"]) == ["*dense*", "*AnnSA*", "AnnSA, ours", "window"]
    assert list(table["psnr"]) == ["–", "*25.7*", "–", "30"]


def test_speed_ups_are_held_against_the_ratio_of_latencies() -> None:
    table = latency_ratios(printed(3)).set_index(["model", "method"])
    assert table.loc[("MAGI-1", "TempCache-Quant"), ["own x", "printed / own"]].tolist() == ["2.85", "1.44"]
    assert table.loc[("SkyReels-V2", "TempCache-Quant"), "own x"] == "10.55"
    assert latency_ratios(printed(4))["printed / own"].iloc[0] == "–"
