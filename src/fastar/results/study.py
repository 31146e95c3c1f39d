"""The study's questions (scripts/study.txt): settings, what they are held against, and their runs, found by label.

Its records hold the runs of many sweeps, which share those at default settings; a line is therefore chosen by what it
is set to, all else at default.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fastar.results.tables import differences

BUDGETED: dict[str, Any] = {"budget_share": 0.15, "sink_frames": 0}
MERGING: dict[str, Any] = {"merged_value": "mean", "log_count": True, "matcher": "ExactMatcher"}
SPARSE: dict[str, Any] = {"warmup_share": 0.3, "layers": None}
TEMPCACHE = (
    BUDGETED | MERGING | {"key": "mean", "match_space": "roped", "recent_share": 0.5, "per_head": True}
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "window": BUDGETED, "int8_window": BUDGETED, "int4_window": BUDGETED,
    "random": {"budget_share": 0.15}, "key_norm": {"budget_share": 0.15}, "sink_recent": {"budget_share": 0.15},
    "tempcache": TEMPCACHE, "tempcache_int8": TEMPCACHE, "tempcache_int4": TEMPCACHE,
    "tempcache_paper": MERGING | {"threshold": 0.9, "key": "last", "match_space": "raw", "sink_frames": 0},
    "annsa": SPARSE | {"bucket_bits": 6},
    "annsa_kmeans": SPARSE, "annsa_quantized": SPARSE, "random_blocks": SPARSE,
}  # fmt: skip
"""Labels of each method at its defaults in the study; None: the label is not there."""


@dataclass(frozen=True)
class Line:
    """A method, and what is not at default in it."""

    method: str
    setting: Mapping[str, Any] = field(default_factory=dict)

    def of(self, rows: pd.DataFrame, protocol: str, metric: str) -> pd.DataFrame:
        """Rows of one metric of this line; none if it was not run.

        Args:
            rows: what `fastar.results.load` returns for one record of the study.
        """
        chosen = rows[
            (rows["method"] == self.method) & (rows["protocol"] == protocol) & (rows["metric"] == metric)
        ]
        for column, value in (DEFAULTS[self.method] | dict(self.setting)).items():
            chosen = chosen[chosen[column].isna() if value is None else chosen[column] == value]
        return chosen


@dataclass(frozen=True)
class Pair:
    """What is held against what, in which protocols; B where nothing is said, recall always in A."""

    question: str
    setting: Line
    against: Line
    protocol: str = "B"


def apart(rows: pd.DataFrame, pair: Pair, metric: str) -> pd.Series | None:
    """Setting minus what it is held against, paired by seed: mean, low, high, n; None where either was not run."""
    protocol = "A" if metric == "recall" else pair.protocol
    parts = {"setting": pair.setting, "against": pair.against}
    found = [line.of(rows, protocol, metric).assign(line=name) for name, line in parts.items()]
    if any(part.empty for part in found):
        return None
    return differences(pd.concat(found), baseline="against", index="line", metrics=[metric]).iloc[0]


def _set(question: str, method: str, label: str, *values: Any, **also: Any) -> Iterator[Pair]:
    for value in values:
        yield Pair(question, Line(method, also | {label: value}), Line(method, also))


def _questions() -> Iterator[Pair]:
    paper, budgeted = "tempcache_paper", "tempcache"
    yield from _set("threshold", paper, "threshold", 0.95, 0.8, 0.7, 0.6, 0.5)
    for matcher in ("LSHMatcher", "QuantizedMatcher"):
        for bits in (2, 4, 8):
            searched = Line(paper, {"matcher": matcher, "bits": bits})
            yield Pair("search, bits", searched, Line(paper), "A")
    yield from _set("key", paper, "key", "mean", "medoid")
    yield from _set("key", budgeted, "key", "last", "medoid")
    for method in (paper, budgeted):
        yield from _set("log-count", method, "log_count", False)
    yield from _set("match space", paper, "match_space", "roped")
    yield from _set("match space", budgeted, "match_space", "raw")
    yield from _set("value", paper, "merged_value", "last")
    yield from _set("value", budgeted, "merged_value", "last", "value_aware")
    yield from _set("heads", budgeted, "per_head", False)
    yield from _set("recent", budgeted, "recent_share", 0, 0.25, 0.75, 0.9)
    yield from _set("sinks", budgeted, "sink_frames", 4, 8)
    yield Pair("sinks", Line("sink_recent"), Line("window"))
    yield from _set("sinks", "window", "sink_frames", 8)
    for share in (0.05, 0.15, 0.3, 0.5):
        at = {"budget_share": share}
        for control in ("window", "random", "key_norm", "sink_recent"):
            yield Pair("budget", Line(budgeted, at), Line(control, at))
    for share in (0.05, 0.15, 0.3, 0.5):
        at = {"budget_share": share}
        for precision in ("int8", "int4"):
            yield Pair("precision", Line(f"tempcache_{precision}", at), Line(f"{precision}_window", at))
    for method in ("annsa", "random_blocks"):
        for share in (0.25, 0.3, 0.75):
            at = {"warmup_share": share}
            yield Pair("dense steps", Line(method, at), Line(method, {"warmup_share": 0}), "A")
    for method in ("annsa", "random_blocks"):
        for first, last in FIRST_LAST:
            yield Pair("layers", Line(method, {"layers": first}), Line(method, {"layers": last}), "A")
    for bits in (2, 4, 6, 8):
        yield Pair("buckets", Line("annsa", {"bucket_bits": bits}), Line("random_blocks"), "A")
    for method in ("annsa_kmeans", "annsa_quantized"):
        yield Pair("buckets", Line(method), Line("random_blocks"), "A")
    yield Pair("buckets", Line("annsa_kmeans"), Line("annsa"), "A")


FIRST_LAST = (
    ("0,1,2,3,4,5", "2,3,4,5,6,7"), ("0,1,2,3", "4,5,6,7"),  # Doom's 70 and 50 % of eight layers
    ("0,1,2,3", "2,3,4,5"), ("0,1,2", "3,4,5"),  # of scenes' six
)  # fmt: skip

QUESTIONS = tuple(_questions())
