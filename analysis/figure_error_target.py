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
# # Thresholds by error target
#
# Not in the paper, whose threshold is one number set by hand. Left: what merging from .9 on does to the output
# of attention, layer by layer, beside what is said of it beforehand: the bound by Cauchy-Schwarz, which holds
# and tells nothing, and the first-order estimate, which is no bound. Middle and right: one threshold for all
# layers against thresholds chosen layer by layer from an error target, by what was measured on training clips
# (`threshold_errors.json` of the checkpoint), at the slots that they leave on held-out ones. Protocol A: dense
# keys in all layers. Intervals are those over seeds.
#
#     python experiments/redundancy.py frames=96 seeds=2 looks=2 query_blocks=2 name=redundancy_doom
#     python experiments/calibrate_thresholds.py
#     python experiments/compare.py -m experiment=error_target

# %%
from matplotlib.ticker import PercentFormatter

from fastar.results import load
from fastar.results.equal_cost import differences_at_equal_cost
from fastar.results.figures import RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE
from fastar.results.qualifiers import unfold
from fastar.results.tables import spread

RUNS = {name: RESULTS / name for name in ("redundancy_doom", "error_target")}
rows = {name: load(folder) for name, folder in RUNS.items()}
for name, folder in RUNS.items():
    print(f"{name}: {made_of(folder)}")

# %%
ERRORS = {
    "error_bound": "bound",
    "error_first_order": "first-order estimate",
    "output_error": "measured",
}
LINES = {
    "tempcache_paper": "one threshold",
    "tempcache_paper_error": "target for each layer",
    "tempcache_paper_mean": "target for their mean",
}
PANELS = {"output_error": "attention output error", "psnr": "PSNR to dense's video (dB)"}

merged = rows["redundancy_doom"].query("method == 'tempcache_paper'")
compared = rows["error_target"].query("protocol == 'A' and method in @LINES")
compared = compared.assign(point=compared["error_target"].fillna(compared["threshold"]))

figure, [[by_layer, *against_slots]] = panels(1, 3, width=3.6, height=3.0)
for place, (metric, label) in enumerate(ERRORS.items()):
    means = unfold(merged, metric).groupby("layer")["value"].mean()
    by_layer.plot(means.index, means, MARKERS[place] + "-", color=PALETTE[place], label=label, markersize=4.5)
by_layer.set(
    title="merging from .9 on",
    xlabel="layer",
    ylabel="|out - dense| / |dense|",
    yscale="log",
    ylim=(0.01, 20),
)
for panel, (metric, label) in zip(against_slots, PANELS.items(), strict=True):
    stats = spread(compared, index=["method", "point"], metrics=["slot_share", metric])
    tables = {name: table.set_index(["method", "point"]) for name, table in stats.groupby("metric")}
    for place, (method, name) in enumerate(LINES.items()):
        slots, found = (tables[key].loc[method].sort_index() for key in ("slot_share", metric))
        reach = [found["mean"] - found["low"], found["high"] - found["mean"]]
        style = {"color": PALETTE[place + 3], "marker": MARKERS[place], "markersize": 4.5, "capsize": 2}
        panel.errorbar(slots["mean"], found["mean"], yerr=reach, label=name, linewidth=1.4, **style)
    panel.set(title="at equal slots", xlabel="slots kept / dense", ylabel=label)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
against_slots[0].set_ylim(bottom=0)
for panel in (by_layer, *against_slots):
    panel.title.set_fontsize(9)
    panel.legend(frameon=False, fontsize=7.5)
publish(figure, "figure_error_target")

# %%
for metric in ("output_error", "recall", "psnr"):
    print(f"{metric}: difference to one threshold at the same slots")
    found = differences_at_equal_cost(compared, baseline="tempcache_paper", cost="slot_share", metric=metric)
    print(found.round(4).to_string(index=False), "\n")
