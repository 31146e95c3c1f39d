# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quality, free-running: what can be seen without a reference, beside what was asked for
#
# The criterion: a score passes if its paired mean difference to dense is at most 1 % of dense's score, or half the
# width of dense's own 95 % interval over seeds, whichever is larger. Fidelity and returning pixels stand beside it,
# since a video that forgets can pass.
#
#     python experiments/compare.py experiment=quality metrics=quality '~metrics.vmaf'

# %%
from fastar.results import load
from fastar.results.figures import RESULTS, made_of, publish_page
from fastar.results.tables import differences, heading, pivot, spread, to_markdown

BACKBONES = ("doom", "scenes")
SCORES = [
    f"{name}_lite"
    for name in (
        "dynamic_degree", "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
    )
]  # fmt: skip
REFERENCED = ["density", "psnr", "ssim", "psnr/truth", "revisit_psnr", "presence"]
rows = {name: load(RESULTS / f"quality_{name}") for name in BACKBONES}

# %%
METHODS = ("dense", "dense_reference", "fast_ar_wide", "fast_ar", "annsa_kmeans", "random_blocks", "tempcache",
           "tempcache_int4_headwise", "int4_window", "window", "empty")  # fmt: skip


def ordered(table, recorded):
    """Lines in one order for both backbones."""
    return (
        table.set_index("method")
        .loc[[name for name in METHODS if name in set(recorded["method"])]]
        .reset_index()
    )


def judged(recorded):
    """Absolute scores of dense, differences of the others, and whether they pass."""
    dense = spread(recorded[recorded["method"] == "dense"], metrics=SCORES).set_index("metric")
    allowed = (0.01 * dense["mean"].abs()).combine((dense["high"] - dense["low"]) / 2, max)
    apart = differences(recorded, baseline="dense", metrics=SCORES)
    passed = apart["mean"].abs() <= apart["metric"].map(allowed)
    cells = pivot(apart).set_index("method")
    for method, metric, good in zip(apart["method"], apart["metric"], passed, strict=True):
        if not good:
            cells.loc[method, heading(metric)] += " **fails**"
    cells.loc["dense"] = pivot(
        dense.reset_index()[["method", "metric", "mean", "low", "high", "n", "missing"]]
    ).iloc[0]
    limit = {heading(metric): f"± {value:.4f}" for metric, value in allowed.items()}
    cells.loc["allowed"] = limit
    table = cells.reset_index()
    return table[table["method"] == "allowed"], ordered(table[table["method"] != "allowed"], recorded)


parts = []
for name in BACKBONES:
    recorded = rows[name]
    known = [metric for metric in REFERENCED if metric in set(recorded["metric"])]
    limit, scores = judged(recorded)
    parts += [
        f"## {name}",
        "What was executed, and how near it is to dense's video (`PSNR`, `SSIM`) and to the truth:",
        to_markdown(ordered(pivot(spread(recorded, metrics=known)), recorded)),
        "Scores of the video alone: of dense as they are, of the others as paired differences to dense; "
        "the last line is what the criterion allows:",
        to_markdown(scores) + "".join(to_markdown(limit).splitlines(keepends=True)[2:]),
    ]

# %%
publish_page(
    "table_quality",
    "# Quality, free-running",
    "Protocol C, 95 % intervals over 20 seeds. The `_lite` scores need no reference, and are never to be read alone: a "
    "video that has forgotten what returns can keep them. `dense_reference` is dense on another engine, "
    "the chaos floor: what rounding changes. "
    "A score **fails** if its mean difference to dense is larger than 1 % of dense's score "
    "and than half of dense's interval.",
    *parts,
    "Runs: "
    + "; ".join(f"`quality_{name}` ({made_of(RESULTS / f'quality_{name}')})" for name in BACKBONES)
    + ".",
)
