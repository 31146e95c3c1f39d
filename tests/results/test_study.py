"""Lines of the study are found by what they are set to, all else at default."""

import pandas as pd
import pytest

from fastar.results.study import DEFAULTS, QUESTIONS, Line, Pair, apart


def runs(method: str, shift: float, **setting: object) -> pd.DataFrame:
    """Recall and PSNR of three seeds, the first in A, the second in B."""
    labels = DEFAULTS[method] | setting | {"method": method}
    rows = [
        labels | {"protocol": protocol, "metric": metric, "seed": seed, "clip": 0, "value": seed + shift}
        for protocol, metric in (("A", "recall"), ("B", "psnr"))
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


ROWS = pd.concat(
    [
        runs("tempcache", 0.0),
        runs("tempcache", 2.0, key="last"),
        runs("tempcache", 9.0, key="last", sink_frames=4),
    ]
)


@pytest.mark.parametrize("metric", ["recall", "psnr"])
def test_a_setting_is_held_against_the_default_in_pairs(metric: str) -> None:
    pair = Pair("key", Line("tempcache", {"key": "last"}), Line("tempcache"))
    found = apart(ROWS, pair, metric)
    assert found is not None and found["n"] == 3
    assert found["mean"] == found["low"] == found["high"] == 2


def test_what_was_not_run_is_none() -> None:
    absent = Pair("key", Line("tempcache", {"key": "medoid"}), Line("tempcache"))
    assert apart(ROWS, absent, "psnr") is None
    in_a = Pair("key", Line("tempcache", {"key": "last"}), Line("tempcache"), "A")
    assert apart(ROWS, in_a, "psnr") is None


def test_a_label_that_is_not_there_is_asked_for_too() -> None:
    rows = pd.concat([runs("annsa", 0.0), runs("annsa", 1.0, layers="0,1")])
    assert set(Line("annsa").of(rows, "A", "recall")["value"]) == {0, 1, 2}
    assert set(Line("annsa", {"layers": "0,1"}).of(rows, "A", "recall")["value"]) == {1, 2, 3}


def test_each_question_changes_what_it_names() -> None:
    assert all(pair.setting != pair.against for pair in QUESTIONS)
    for pair in QUESTIONS:
        for line in (pair.setting, pair.against):
            assert set(line.setting) - {"bits", "matcher"} <= set(DEFAULTS[line.method]), line
