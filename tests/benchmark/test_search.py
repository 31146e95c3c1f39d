"""What searches for partners find: numbers by hand, and all of them on the slots of a small rollout."""

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.ann import ExactMatcher
from fastar.benchmark import search
from fastar.benchmark.command import run
from fastar.benchmark.search import SEARCHES, Judged

Configs = Callable[..., DictConfig]


def second_for_the_last(queries: Tensor, keys: Tensor) -> Tensor:
    """Right but for the last query, which gets the second key; none for the first."""
    found, _ = ExactMatcher().nearest(queries, keys, metric="euclidean")
    found[:, 0], found[:, -1] = -1, 1
    return found


def test_shares_and_excess_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SEARCHES", {"poor": second_for_the_last})
    keys = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]])
    queries = torch.tensor(
        [[[0.0, 1.0], [10.0, 2.0], [0.0, 3.0], [0.0, 4.0]]]
    )  # squared distances 1, 4, 9, 16
    judged = Judged(ExactMatcher(), frame=1, share=1.0)
    judged.nearest(queries, keys, metric="euclidean")
    assert judged.rows() == []  # not while it is inactive
    judged.active = True
    for _ in range(2):
        index, _ = judged.nearest(queries, keys, metric="euclidean")
        assert index.tolist() == [[0, 1, 0, 0]]
    judged.nearest(queries, keys, metric="euclidean", excluded=(torch.zeros(1, 4), torch.ones(1, 4)))
    [row] = judged.rows()
    # the nearer half are the first two; the last query's answer is 100 + 16 away, not 16
    assert row.pop("excess") == pytest.approx((4 + 9 + 116) / (4 + 9 + 16) - 1)
    assert row == {
        "search": "poor",
        "queries": 8,
        "found": 0.75,
        "best": 0.5,
        "best_near": 0.5,
        "excess_near": 0.0,
    }


def test_all_searches_on_a_rollout(benchmark_config: Configs) -> None:
    asked = ("mode=search", "search.frames=18", "search.commits=2", "search.share=0.5")
    rows = run(benchmark_config(*asked, "method=[tempcache]"))["rows"]
    assert [row["search"] for row in rows] == list(SEARCHES)
    assert all(row["budget"] == 4 and row["queries"] == rows[0]["queries"] > 0 for row in rows)
    found = {row["search"]: row for row in rows}
    assert found["exact, bfloat16"]["best"] > 0.9 > found["exact, bfloat16, 16 directions"]["best"] > 0.05
    assert found["int8 codes"]["excess"] < 0.05 < found["exact, bfloat16, 16 directions"]["excess"]
    assert all(0 <= row["best"] <= row["found"] <= 1 and row["excess"] >= 0 for row in rows)
    with pytest.raises(ValueError, match=r"full features, which 'window' has not: set method=\[tempcache\]"):
        run(benchmark_config(*asked, "method=[window]"))


@pytest.mark.gpu
def test_the_kernel_of_fused_commits_finds_what_its_features_say(benchmark_config: Configs) -> None:
    config = benchmark_config("mode=search", "search.frames=18", "method=[tempcache]", "device=cuda")
    found = {row["search"]: row for row in run(config)["rows"]}
    for along in ("", ", 64 directions", ", 32 directions", ", 16 directions"):
        plain, fused = found[f"exact, bfloat16{along}"], found[f"fused kernel{along}"]
        assert fused["best"] == pytest.approx(plain["best"], abs=0.03) and fused["found"] == 1, along
