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
# # Figure 10: ablations of TempCache
#
# (a) the merge threshold, (b) the search behind the matching, (c) its speed, and which key stands for a
# merged group, on both backbones. Recall is 1 - total variation against dense attention on the same history
# (protocol A), in the last chunk: of 48 frames that follow 192 true ones on Doom, of 92 that follow 4 on scenes.
# Grey: the paper's numbers, of Rolling-Forcing, where it gives the ends of a curve. Its search speeds (c) stand
# alone: ours would be those of a model a hundredth of the size.
#
#     bash scripts/study.sh 0
#     python experiments/compare.py -m experiment=ablation_threshold      # Doom's thresholds

# %%
import pandas as pd

from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE
from fastar.results.study import Line
from fastar.results.tables import spread

BACKBONES = ("Doom", "scenes")
RECORDS = {"Doom": "study_doom", "scenes": "study_scenes", "Doom, thresholds": "ablation_threshold"}
rows = {name: load(RESULTS / record) for name, record in RECORDS.items()}
for name, record in RECORDS.items():
    print(f"{name}: {made_of(RESULTS / record)}")
PAPER_FORM = "tempcache_paper"
runs = rows["Doom, thresholds"]
rows["Doom, thresholds"] = runs[runs["method"] == PAPER_FORM]

# %%
PAPER_THRESHOLD = {0.9: 0.90, 0.5: 0.10}
PAPER_BITS = {2: 0.20, 8: 0.80, 32: 0.98}
PAPER_FPS = {2: 32, 32: 10}
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
PAPER_KEY = {"last": 0.90, "mean": 0.75, "medoid": 0.66}


def means(lines, name, metric="recall"):
    """Mean and 95 % interval over seeds of each of some lines, by their key."""
    parts = [line.of(rows[name], "A", metric).assign(line=key) for key, line in lines.items()]
    return spread(pd.concat(parts), index="line", metrics=[metric])


def draw(panel, x, stats, colour, label, marker="o", **style):
    """Means with their intervals."""
    reach = [stats["mean"] - stats["low"], stats["high"] - stats["mean"]]
    panel.errorbar(
        x,
        stats["mean"],
        yerr=reach,
        color=colour,
        label=label,
        marker=marker,
        markersize=4.5,
        capsize=2,
        linewidth=1.4,
        **style,
    )


def paper(panel, values, label="paper"):
    """What the paper gives of a curve."""
    panel.plot(list(values), list(values.values()), "x:", color=PAPER, markersize=7, label=label)


figure, axes = panels(2, 2, width=4.2, height=2.9)
[threshold, bits], [speed, key] = axes
paper(threshold, PAPER_THRESHOLD, "recall, paper")
for place, name in enumerate(BACKBONES):
    for metric, label, style in (("recall", "recall", "-"), ("slot_share", "slots kept / dense", "--")):
        if name == "Doom":
            chosen = rows["Doom, thresholds"].query("protocol == 'A'")
            stats = spread(chosen, index="threshold", metrics=[metric]).rename(columns={"threshold": "line"})
        else:
            lines = {value: Line(PAPER_FORM, {"threshold": value}) for value in THRESHOLDS}
            stats = means(lines, name, metric)
        stats = stats.sort_values("line")
        draw(
            threshold,
            stats["line"],
            stats,
            PALETTE[place],
            f"{label}, {name}",
            MARKERS[place],
            linestyle=style,
        )
threshold.set(title="(a) merge threshold", xlabel="cosine from which keys merge", ylim=(0, 1.05))
threshold.invert_xaxis()

paper(bits, PAPER_BITS, "paper")
for place, name in enumerate(BACKBONES):
    for matcher, label, style in (
        ("LSHMatcher", "LSH, 8 tables", "-"),
        ("QuantizedMatcher", "quantised", "--"),
    ):
        lines = {count: Line(PAPER_FORM, {"matcher": matcher, "bits": count}) for count in (2, 4, 8)}
        stats = means(lines, name)
        draw(bits, stats["line"], stats, PALETTE[place], f"{label}, {name}", MARKERS[place], linestyle=style)
    exact = means({"exact": Line(PAPER_FORM)}, name)["mean"].iloc[0]
    bits.axhline(exact, color=PALETTE[place], linestyle=":", linewidth=1.2, label=f"exact search, {name}")
bits.set(
    title="(b) bits of the search: recall",
    xlabel="bits",
    ylim=(0, 1.05),
    xscale="log",
    xticks=[2, 4, 8, 16, 32],
)
bits.set_xticklabels(["2", "4", "8", "16", "32"])
bits.minorticks_off()

paper(speed, PAPER_FPS)
speed.set(
    title="(c) bits of the search: frames a second",
    xlabel="bits",
    ylim=(0, 36),
    xscale="log",
    xticks=[2, 4, 8, 16, 32],
)
speed.set_xticklabels(["2", "4", "8", "16", "32"])
speed.minorticks_off()
speed.text(0.03, 0.06, "not measured here", transform=speed.transAxes, fontsize=8, color=PAPER)

places = {name: place for place, name in enumerate(PAPER_KEY)}
key.plot(list(places.values()), list(PAPER_KEY.values()), "x", color=PAPER, markersize=8, label="paper")
forms = [
    (name, *form)
    for form in ((PAPER_FORM, "threshold .9"), ("tempcache", "budget 15 %"))
    for name in BACKBONES
]
for order, (name, method, label) in enumerate(forms):
    stats = means({which: Line(method, {"key": which}) for which in places}, name)
    x = stats["line"].map(places) + 0.1 * (order + 1)
    style = {"linestyle": "none", "mfc": "white" if method == "tempcache" else None}
    draw(
        key,
        x,
        stats,
        PALETTE[BACKBONES.index(name)],
        f"{label}, {name}",
        MARKERS[BACKBONES.index(name)],
        **style,
    )
key.set(
    title="key that stands for a group: recall",
    ylim=(0, 1.05),
    xticks=list(places.values()),
    xlim=(-0.3, 2.8),
)
key.set_xticklabels(list(places))
for panel, corner in (
    (threshold, "upper right"),
    (bits, "lower right"),
    (speed, "best"),
    (key, "lower left"),
):
    panel.title.set_fontsize(9)
    panel.legend(frameon=False, fontsize=7, loc=corner, handlelength=3)
publish(figure, "figure_10_ablations")

# %%
for name in BACKBONES:
    print(name, means({which: Line(PAPER_FORM, {"key": which}) for which in places}, name).round(3), sep="\n")
