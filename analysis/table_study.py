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
# # The study: each design question as a difference
#
# A setting minus what it is held against, all else at default (TempCache at 15 % of the bytes, the paper's form at
# threshold .9), paired by seed, with 95 % bootstrap intervals. Recall is of protocol A and the last chunk; the others
# of B, for search and sparse attention of A. Scenes start from four frames, so that a control is exact, and its PSNR to
# dense's video endless (cut at 100 dB), until it is full: its mean says when that was, so that the error of the latents
# stands there. Bold: the interval leaves out zero.
#
#     bash scripts/study.sh 0

# %%
import pandas as pd

from fastar.metrics.bootstrap import Interval
from fastar.results import load
from fastar.results.figures import RESULTS, made_of, publish_page
from fastar.results.study import QUESTIONS, apart
from fastar.results.tables import format_interval, to_markdown

RECORDS = {"Doom": "study_doom", "scenes": "study_scenes"}
rows = {name: load(RESULTS / record) for name, record in RECORDS.items()}
for name, record in RECORDS.items():
    print(f"{name}: {made_of(RESULTS / record)}")


# %%
def words(line):
    """A line as text."""
    said = " ".join(f"{name}={value}" for name, value in line.setting.items())
    return f"{line.method} {said}".strip()


DECIMALS = {"recall": 3, "psnr": 2, "revisit_psnr": 2, "latent_error": 4, "presence": 3}
HEADS = {
    "Doom": {"recall": "recall", "psnr": "psnr (dB)", "revisit_psnr": "revisit_psnr (dB)"},
    "scenes": {"recall": "recall", "latent_error": "latent_error", "presence": "presence"},
}
SPARSE = ("annsa", "annsa_kmeans", "annsa_quantized", "random_blocks")


def cell(table, pair, metric):
    """Difference with its interval, bold where that leaves out zero."""
    found = apart(table, pair, metric)
    if found is None:
        return "–"
    stats = Interval(found["mean"], found["low"], found["high"], found["n"])
    text = format_interval(stats, DECIMALS[metric])
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def shares(table, pair):
    """Slots, or for sparse attention density, of both lines."""
    metric = "density" if pair.setting.method in SPARSE else "slot_share"
    means = [line.of(table, pair.protocol, metric)["value"].mean() for line in (pair.setting, pair.against)]
    return ", ".join(f"{mean:.3f}".removeprefix("0") for mean in means)


def table_of(name):
    """A line a pair that was run on this backbone."""
    lines = []
    for pair in QUESTIONS:
        cells = {title: cell(rows[name], pair, metric) for metric, title in HEADS[name].items()}
        if set(cells.values()) != {"–"}:
            named = {
                "question": pair.question,
                "setting": words(pair.setting),
                "against": words(pair.against),
            }
            lines.append(named | cells | {"slots or density": shares(rows[name], pair)})
    return pd.DataFrame(lines)


publish_page(
    "table_study",
    "# The study: each design question as a difference",
    "A setting minus what it is held against, all else at default (TempCache in 15 % of dense's bytes, the paper's "
    "form at threshold .9), paired by seed, 95 % bootstrap intervals over 20 seeds; bold where they leave out zero. "
    "They are not corrected for how many they are: of twenty such lines without effect one would be bold.",
    "Recall: protocol A, last chunk. The others: protocol B, of search and sparse attention A. `psnr`: to dense's "
    "video; `revisit_psnr`: against the truth; `latent_error`: of the latents, relative to dense's, lower is better. "
    "It stands for `psnr` on scenes, which start from four frames: there a control is exact until it is full, and 100 "
    "dB, as far as PSNR is counted, would outweigh what follows. Last column: of dense's "
    "slots, for sparse attention the "
    "density, of both. Doom's thresholds: [README](../README.md#the-papers-form).",
    *(
        part
        for name, record in RECORDS.items()
        for part in (
            f"## {name}",
            to_markdown(table_of(name)),
            f"Runs: `{record}`, {made_of(RESULTS / record)}.",
        )
    ),
)
