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
# merged group. Recall is 1 - total variation against dense attention on the same history (protocol A), in the
# last chunk of 48 frames that follow 192 true ones. Grey: the paper's numbers, of Rolling-Forcing, where it
# gives the ends of a curve. Its search speeds (c) stand alone: ours would be those of a model a hundredth of
# the size.
#
#     python experiments/compare.py -m experiment=ablation_threshold
#     python experiments/compare.py -m experiment=ablation_ann
#     python experiments/compare.py -m experiment=ablation_key

# %%
from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE
from fastar.results.tables import spread

RUNS = {name: RESULTS / f"ablation_{name}" for name in ("threshold", "ann", "key")}
rows = {name: load(folder).query("protocol == 'A'") for name, folder in RUNS.items()}
for name, folder in RUNS.items():
    print(f"{name}: {made_of(folder)}")

# %%
PAPER_THRESHOLD = {0.9: 0.90, 0.5: 0.10}
PAPER_BITS = {2: 0.20, 8: 0.80, 32: 0.98}
PAPER_FPS = {2: 32, 32: 10}
PAPER_KEY = {"last": 0.90, "mean": 0.75, "medoid": 0.66}


def means(name, index, metric, **where):
    """Mean and 95 % interval over seeds, by `index`."""
    chosen = rows[name]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return spread(chosen.dropna(subset=[index]), index=index, metrics=[metric]).sort_values(index)


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
for place, (metric, label) in enumerate((("recall", "recall"), ("slot_share", "slots kept / dense"))):
    stats = means("threshold", "threshold", metric, method="tempcache_paper")
    draw(threshold, stats["threshold"], stats, PALETTE[place], label, MARKERS[place])
threshold.set(title="(a) merge threshold", xlabel="cosine from which keys merge", ylim=(0, 1.05))
threshold.invert_xaxis()

paper(bits, PAPER_BITS, "paper")
for place, (matcher, label) in enumerate(
    (("LSHMatcher", "LSH, 8 tables"), ("QuantizedMatcher", "quantised"))
):
    stats = means("ann", "bits", "recall", method="tempcache_paper", matcher=matcher)
    draw(bits, stats["bits"], stats, PALETTE[place], label, MARKERS[place])
exact = means("ann", "method", "recall", method="tempcache_paper_exact")["mean"].iloc[0]
bits.axhline(exact, color=PALETTE[2], linestyle="--", linewidth=1.2, label="exact search")
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
for order, (method, label) in enumerate((("tempcache_paper", "threshold .9"), ("tempcache", "budget 15 %"))):
    stats = means("key", "key", "recall", method=method)
    x = stats["key"].map(places) + 0.12 * (order + 1)
    draw(key, x, stats, PALETTE[order], label, MARKERS[order], linestyle="none")
key.set(
    title="key that stands for a group: recall",
    ylim=(0, 1.05),
    xticks=list(places.values()),
    xlim=(-0.4, 2.6),
)
key.set_xticklabels(list(places))
for panel in (threshold, bits, speed, key):
    panel.title.set_fontsize(9)
    panel.legend(frameon=False, fontsize=7.5, loc="lower left" if panel in (threshold, key) else "best")
publish(figure, "figure_10_ablations")

# %%
print(
    "threshold\n",
    rows["threshold"].query("metric == 'recall'").groupby("threshold")["value"].mean().round(3),
    "\n",
)
print(
    "representative key\n",
    rows["key"].query("metric == 'recall'").groupby(["method", "key"])["value"].mean().round(3),
)
