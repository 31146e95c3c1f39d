"""The numbers of analysis/findings.md are those of the recorded runs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pandas as pd
import pytest

from fastar.results import load
from fastar.results.figures import ANALYSIS, RESULTS
from fastar.results.qualifiers import unfold
from fastar.results.study import Line, Pair
from fastar.results.study import apart as held_apart
from fastar.results.tables import differences, spread

TEXT = re.sub(r"\s+", " ", (ANALYSIS / "findings.md").read_text())


@cache
def rows_of(record: str) -> pd.DataFrame:
    return load(RESULTS / record)


def chosen(record: str, **where: Any) -> pd.DataFrame:
    rows = rows_of(record)
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert not rows.empty, (record, where)
    return rows


def mean(metric: str, record: str, **where: Any) -> pd.Series:
    """Mean, low, high of a line."""
    rows = chosen(record, **where).assign(line=0)
    return spread(rows, index="line", metrics=[metric]).iloc[0]


def apart(metric: str, line: tuple[str, dict[str, Any]], base: tuple[str, dict[str, Any]]) -> pd.Series:
    """Mean, low, high of a line minus another, in pairs."""
    parts = [
        chosen(record, **where).assign(line=name) for name, (record, where) in (("a", line), ("b", base))
    ]
    found = differences(pd.concat(parts), baseline="b", index="line", metrics=[metric])
    return found.iloc[0]


def said(stats: pd.Series, decimals: int, *, scale: float = 1, bare: bool = False) -> str:
    """`mean [low, high]` as the text has it: a negative scale tells a loss; bare numbers have no leading zero."""
    low, high = sorted((scale * stats["low"], scale * stats["high"]))
    middle, low, high = (f"{value:.{decimals}f}" for value in (scale * stats["mean"], low, high))
    text = f"{middle} [{low}, {high}]"
    return re.sub(r"\b0\.", ".", text) if bare else text


BUDGETS = [("frontier", share) for share in (0.05, 0.1, 0.15, 0.3, 0.5)]
BUDGETS += [("frontier_short", share) for share in (0.05, 0.15)]


@pytest.mark.parametrize(("record", "share"), BUDGETS)
def test_the_table_of_losses(record: str, share: float) -> None:
    where = {"protocol": "B", "budget_share": share}
    cells = []
    for metric, control in (
        ("revisit_psnr", "random"), ("revisit_psnr", "window"), ("psnr", "random"), ("psnr", "window"),
        ("revisit_psnr", "int4_window"),
    ):  # fmt: skip
        pair = [(record, where | {"method": method}) for method in ("tempcache", control)]
        cells.append(said(apart(metric, *pair), 2))
    name = f"{100 * share:g} %" + (", short" if record == "frontier_short" else "")
    assert f"| {name} | {' | '.join(cells)} |" in TEXT


A, B, C = ({"protocol": name} for name in "ABC")
EVEN, SMALL = B | {"budget_share": 0.15}, B | {"budget_share": 0.05}
PAPER = {"method": "tempcache_paper"}
PROMPT_TOKENS = A | {"prompt_share": 0.35}


def line(record: str, method: str, within: dict[str, Any] = A, **setting: Any) -> tuple[str, dict[str, Any]]:
    """Record and labels of one line."""
    return record, within | {"method": method} | setting


NO_DENSE_STEP = {
    "kmeans": line("annsa_prompt_none_dense", "annsa_kmeans", density_target=0.5),
    "lsh": line("annsa_prompt_none_dense", "annsa", density_target=0.5),
}
PAIRED = [
    # metric, line, baseline, decimals, -1 for a loss
    *(
        (f"{metric}_lite", line(f"quality_{name}", method, C), line(f"quality_{name}", "dense", C), 3, 1)
        for name, method, metric in (
            ("doom", "empty", "background_consistency"), ("doom", "empty", "temporal_flickering"),
            ("doom", "empty", "motion_smoothness"), ("doom", "empty", "subject_consistency"),
            ("scenes", "empty", "subject_consistency"), ("scenes", "empty", "background_consistency"),
            ("doom", "random_blocks", "temporal_flickering"),
        )
    ),
    *(
        ("revisit_psnr", line("quality_doom", method, C), line("quality_doom", "dense", C), decimals, -1)
        for method, decimals in (("fast_ar_wide", 2), ("empty", 1))
    ),
    *(
        ("recall", line("frontier", "tempcache", budget_share=share),
         line("frontier", "window", budget_share=share), 3, 1)
        for share in (0.05, 0.15)
    ),
    *(
        ("revisit_psnr", line(record, f"tempcache_int4{split}", within),
         line(record, f"int4_window{split}", within), 2, scale)
        for record, split, within, scale in (
            ("frontier", "", EVEN, 1), ("frontier_short", "", EVEN, -1), ("frontier", "_headwise", EVEN, -1),
            ("frontier_short", "_headwise", SMALL, -1), ("frontier", "_headwise", SMALL, 1),
        )
    ),
    *(
        ("revisit_psnr", line("frontier", method, B, **setting), line("frontier", "dense", B), decimals, scale)
        for method, setting, decimals, scale in (
            ("tempcache_paper", {}, 2, -1), ("random", {"budget_share": 0.5}, 2, -1),
            ("tempcache_int8", {"budget_share": 0.5}, 2, 1), ("empty", {}, 1, -1),
        )
    ),
    *(
        ("psnr", line(record, method, density_target=density), NO_DENSE_STEP[base], 1, -1)
        for record, method, density, base in (
            ("annsa_prompt_one_dense", "annsa_kmeans", 0.35, "kmeans"),
            ("annsa_prompt", "annsa_kmeans", 0.13, "kmeans"), ("annsa_prompt", "annsa_kmeans", 0.35, "kmeans"),
            ("annsa_prompt_one_dense", "annsa", 0.35, "lsh"), ("annsa_prompt", "annsa", 0.13, "lsh"),
        )
    ),
]  # fmt: skip


def told(stats: pd.Series, decimals: int, scale: float) -> bool:
    """Whether the text has mean and interval; the unit may stand between them, shares lack the leading zero."""
    middle, _, interval = said(stats, decimals, scale=scale, bare=decimals > 2).partition(" ")
    return re.search(rf"(?<![\d.]){re.escape(middle)}( dB| %)? {re.escape(interval)}", TEXT) is not None


@pytest.mark.parametrize(("metric", "of", "base", "decimals", "scale"), PAIRED)
def test_paired_differences(metric: str, of: Any, base: Any, decimals: int, scale: int) -> None:
    found = apart(metric, of, base)
    assert told(found, decimals, scale), said(found, decimals, scale=scale)


def coded(bits: int) -> Line:
    """The paper's form, searched by codes of so many bits."""
    return Line("tempcache_paper", {"matcher": "QuantizedMatcher", "bits": bits})


FORM, BUDGETED = Line("tempcache_paper"), Line("tempcache")
UNCOUNTED, RAW = Line("tempcache", {"log_count": False}), Line("tempcache", {"match_space": "raw"})
FIRST = {"doom": "0,1,2,3,4,5", "scenes": "0,1,2,3"}
LAST = {"doom": "2,3,4,5,6,7", "scenes": "2,3,4,5"}


def at(method: str, share: float) -> Line:
    """A method in so many bytes."""
    return Line(method, {"budget_share": share})


def form(**setting: Any) -> Line:
    """The paper's form with a setting."""
    return Line("tempcache_paper", setting)


STUDY = [
    # backbone, metric, line, what it is held against, decimals, -1 for a loss, protocol
    *((name, "recall", UNCOUNTED, BUDGETED, 3, -1, "A") for name in FIRST),
    *((name, "recall", RAW, BUDGETED, 3, -1, "A") for name in FIRST),
    *((name, "recall", coded(2), FORM, 3, 1, "A") for name in FIRST),
    *((name, "recall", form(key="mean"), FORM, 3, -1, "A") for name in FIRST),
    *((name, "recall", form(key="medoid"), FORM, 3, 1, "A") for name in FIRST),
    ("doom", "recall", form(log_count=False), FORM, 3, 1, "A"),
    ("scenes", "recall", form(log_count=False), FORM, 3, -1, "A"),
    ("doom", "psnr", UNCOUNTED, BUDGETED, 2, -1, "B"),
    ("doom", "psnr", form(log_count=False), FORM, 2, 1, "B"),
    ("doom", "psnr", RAW, BUDGETED, 2, -1, "B"),
    ("doom", "revisit_psnr", RAW, BUDGETED, 2, 1, "B"),
    *(
        (
            name,
            metric,
            Line("annsa", {"layers": FIRST[name]}),
            Line("annsa", {"layers": LAST[name]}),
            *how,
            "A",
        )
        for name, metric, *how in (("doom", "psnr", 2, 1), ("scenes", "latent_error", 4, -1))
    ),
    ("doom", "psnr", form(merged_value="last"), FORM, 2, 1, "B"),
    ("doom", "revisit_psnr", form(merged_value="last"), FORM, 2, 1, "B"),
    ("scenes", "presence", form(merged_value="last"), FORM, 3, 1, "B"),
    ("doom", "psnr", Line("tempcache", {"merged_value": "last"}), BUDGETED, 2, -1, "B"),
    ("scenes", "latent_error", Line("tempcache", {"merged_value": "last"}), BUDGETED, 4, 1, "B"),
    *(
        ("doom", "psnr", Line("tempcache", setting), BUDGETED, 2, -1, "B")
        for setting in ({"per_head": False}, {"recent_share": 0}, {"sink_frames": 4})
    ),
    *(
        ("doom", metric, at("tempcache_int8", 0.5), at("int8_window", 0.5), 2, 1, "B")
        for metric in ("psnr", "revisit_psnr")
    ),
    *(
        (
            "doom",
            "psnr",
            Line("annsa", {"warmup_share": share}),
            Line("annsa", {"warmup_share": 0}),
            2,
            1,
            "A",
        )
        for share in (0.25, 0.3, 0.75)
    ),
    *(
        ("scenes", "latent_error", at("tempcache", share), at("window", share), 4, scale, "B")
        for share, scale in ((0.05, 1), (0.15, 1), (0.3, -1), (0.5, -1))
    ),
    ("scenes", "presence", at("tempcache", 0.05), at("window", 0.05), 3, -1, "B"),
    *(
        ("scenes", "latent_error", at("tempcache_int8", share), at("int8_window", share), 4, scale, "B")
        for share, scale in ((0.05, 1), (0.15, -1))
    ),
]


@pytest.mark.parametrize(("backbone", "metric", "of", "base", "decimals", "scale", "protocol"), STUDY)
def test_the_study(
    backbone: str, metric: str, of: Line, base: Line, decimals: int, scale: int, protocol: str
) -> None:
    found = held_apart(rows_of(f"study_{backbone}"), Pair("", of, base, protocol), metric)
    assert found is not None
    assert told(found, decimals, scale), said(found, decimals, scale=scale)


def intervals(text: str) -> set[tuple[float, float, float]]:
    """All `mean [low, high]` in a text."""
    numbers = r"(-?[\d.]+)(?: dB)? \[(-?[\d.]+), (-?[\d.]+)\]"
    return {tuple(map(float, found)) for found in re.findall(numbers, text)}  # type: ignore[misc]


def test_the_answers_in_the_readme_are_those_of_the_table_of_the_study() -> None:
    section = (ANALYSIS / "README.md").read_text().partition("## Ablations")[2].partition("\n## ")[0]
    table = intervals((ANALYSIS / "tables/table_study.md").read_text())
    table |= {(-mean, -high, -low) for mean, low, high in table}
    found = intervals(section)
    assert len(found) > 40 and not found - table


MEANS = [
    # metric, line, decimals, scale
    *(
        ("recall", line("annsa_prompt_none_dense", method, density_target=0.34), 3, 1)
        for method in ("annsa_kmeans", "annsa", "random_blocks")
    ),
    ("psnr", NO_DENSE_STEP["kmeans"], 1, 1),
    ("prompt_recall", line("annca_bits", "annca", bits=6), 1, 100),
    ("prompt_recall", line("annca_bits", "annca", bits=8), 1, 100),
    ("prompt_recall", line("annca_quantized", "annca_quantized", dims=4), 1, 100),
    ("prompt_recall", line("prompt_tokens", "ranked_lsh", prompt_share=0.35), 1, 100),
    ("psnr", line("prompt_tokens", "dense_merged", C), 1, 1),
    ("psnr", line("prompt_tokens", "dense_merged", A), 1, 1),
    *(("psnr", line(f"quality_{name}", "dense_reference", C), 1, 1) for name in ("doom", "scenes")),
    ("psnr", line("quality_doom", "tempcache_int4_headwise", C), 1, 1),
    ("psnr", line("quality_scenes", "window", C), 1, 1),
    *(
        ("background_consistency_lite/drift/end", line("quality_doom", method, C), 3, 1)
        for method in ("dense", "fast_ar_wide", "fast_ar")
    ),
]


@pytest.mark.parametrize(("metric", "of", "decimals", "scale"), MEANS)
def test_means(metric: str, of: Any, decimals: int, scale: int) -> None:
    found = mean(metric, of[0], **of[1])
    assert told(found, decimals, scale), said(found, decimals, scale=scale)


SINGLE = [
    # metric, line, the words of the text with the number first that is in them
    ("prompt_density", line("prompt_tokens", "ranked_lsh", prompt_share=0.35), "leaves .839 of the pairs"),
    ("prompt_density", line("prompt_tokens", "dense_merged"), "leaves .498"),
    ("prompt_share", line("annca_bits", "annca", bits=6), "reads 34.3 % of the tokens"),
    ("prompt_share_any", line("annca_bits", "annca", bits=6), "read 99.9 % of the prompt"),
    ("prompt_mass", line("annca_bits", "annca", bits=8), "matter and .368 of the mass"),
    (
        "recall",
        line(
            "study_doom",
            "tempcache_paper",
            matcher="ExactMatcher",
            key="last",
            log_count=True,
            match_space="raw",
        ),
        "(.858 on Doom",
    ),
    (
        "slot_share",
        line("study_doom", "tempcache_paper", matcher="QuantizedMatcher", bits=2),
        "(96 % of the slots",
    ),
    ("byte_share", line("frontier", "tempcache_paper", B), "stores 103 % of the bytes"),
    ("slot_share", line("frontier", "tempcache_paper", B), "keeps 63 % of the slots"),
    ("density", line("quality_doom", "fast_ar", C), "executes .068"),
    ("density", line("quality_doom", "fast_ar_wide", C), "on Doom at .377"),
    ("density", line("quality_scenes", "fast_ar", C), ".219 on scenes"),
    ("density", line("quality_scenes", "fast_ar_wide", C), "scenes, at .474"),
    ("density", line("bounded", "fast_ar", C), "density .095"),
    ("density", line("bounded", "tempcache", C), "for .135"),
    ("psnr/truth", line("bounded", "window", C), "window 15.1"),
    ("speedup/dense/steady", line("wan_speed", "window", C), "2.71 times as fast"),
    ("speedup/dense/steady", line("wan_speed", "tempcache", C), "same bytes 0.97 times"),
    ("fps_denoise/steady", line("wan_speed", "tempcache", C), "4.26 latent frames"),
    ("fps_denoise/steady", line("wan_speed", "window", C), "has 7.01"),
]


@pytest.mark.parametrize(("metric", "of", "phrase"), SINGLE)
def test_numbers_without_an_interval(metric: str, of: Any, phrase: str) -> None:
    assert phrase in TEXT
    number = re.search(r"\d*\.?\d+", phrase)
    assert number is not None
    decimals, scale = len(number[0].partition(".")[2]), 100 if "%" in phrase else 1
    assert round(scale * mean(metric, of[0], **of[1])["mean"], decimals) == float(number[0])


def test_redundancy() -> None:
    rows = load([RESULTS / f"redundancy_{name}" for name in ("doom", "scenes", "untrained")])
    dense = rows[rows["method"] == "dense"]
    top = unfold(dense, "top_recall").query("density == 0.3")
    top = top.groupby(["weights", "entries", "backbone"])["value"].mean()
    above = unfold(dense, "key_above").query("threshold == 0.9 and kind == 'cosine'")
    above = above.groupby(["weights", "space", "pairs", "backbone"])["value"].mean()

    def pair(values: pd.Series, *key: str) -> str:
        return " and ".join(f"{values[(*key, name)]:.3f}".lstrip("0") for name in ("doom", "scenes"))

    for entries in ("query", "blocks"):
        for weights in ("trained", "random"):
            number = pair(top, weights, entries)
            assert number in re.sub(r" (of attention|on Doom|on scenes)", "", TEXT), number
    for space, pairs in (("raw", "nearest"), ("raw", "random"), ("roped", "nearest")):
        assert pair(above, "trained", space, pairs) in TEXT
    assert f"has more, {above['random', 'raw', 'nearest', 'scenes']:.3f}".replace("0.", ".") in TEXT
    assert (unfold(dense, "key_identical")["value"] == 0).all()
    paper = rows[rows["method"] == "tempcache_paper"]
    for metric, phrase in (
        ("output_error", "errs by .123 on Doom and .214 on scenes"),
        ("error_bound", "says 3.39 and 5.64"),
        ("error_first_order", "estimate .312 and .971"),
    ):
        assert phrase in TEXT
        means = unfold(paper, metric).groupby("backbone")["value"].mean()
        numbers = re.findall(r"\d*\.\d+", phrase)
        for name, number in zip(("doom", "scenes"), numbers, strict=True):
            assert round(means[name], len(number.partition(".")[2])) == float(number), metric


def test_every_record_is_named_with_its_command() -> None:
    table = TEXT.partition("## Records")[2]
    known = {path.name for path in RESULTS.iterdir() if path.name != "speed"}
    patterns = [name.replace("*", r"\w*") for name in re.findall(r"`([\w*]+)`", table)]
    for name in known & set(re.findall(r"`(\w+)`", TEXT.partition("## Records")[0])):
        assert any(re.fullmatch(rf"(annsa_prompt)?{pattern}", name) for pattern in patterns), name
