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
# # Figure 5: temporal correspondence
#
# The paper draws correspondents on frames: for a query, the key of an earlier frame that it attends to most. Here the
# simulators know which token of the frame before shows the same point, so correspondents are counted instead. Four
# ways to find one in the frame before: the key with the highest logit for the token's query, before and after RoPE;
# the key nearest to the token's own; the token at the same place. Means over clips and heads. Dotted: an untrained
# model. On scenes things move by at most 3 pixels a frame, so the same place is always right there.
#
#     python experiments/redundancy.py frames=96 seeds=2 looks=2 query_blocks=2 name=redundancy_doom
#     python experiments/redundancy.py backbone=scenes data=scenes frames=96 seeds=4 looks=3 name=redundancy_scenes
#     for data in doom scenes; do python experiments/redundancy.py backbone=$data data=$data checkpoint=random \
#         frames=96 seeds=1 looks=1 query_blocks=2 'method=[dense]' name=redundancy_untrained; done

# %%
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from fastar.results import load
from fastar.results.figures import RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE
from fastar.results.qualifiers import unfold

RUNS = [RESULTS / f"redundancy_{name}" for name in ("doom", "scenes", "untrained")]
rows = load(RUNS).query("method == 'dense'")
found = unfold(rows, "correspondence").query("search == 'previous' and within == 0")
best = unfold(rows, "correspondence_head").query("weights == 'trained' and by == 'query_roped'")
print(made_of(RUNS))

# %%
PANELS = (
    ("doom", "all", "Doom: all tokens"),
    ("doom", "moved", "Doom: tokens that moved"),
    ("scenes", "thing", "scenes: things"),
)
WAYS = {
    "query_roped": "query's best key, roped",
    "query_raw": "query's best key, raw",
    "key_raw": "nearest key, raw",
    "same_place": "same place",
}
figure, [axes] = panels(1, 3, height=2.8)
for panel, (backbone, group, title) in zip(axes, PANELS, strict=True):
    chosen = found[(found["backbone"] == backbone) & (found["group"] == group)]
    table = chosen.pivot_table(index="layer", columns=["weights", "by"], values="value")
    for place, (way, label) in enumerate(WAYS.items()):
        colour = PALETTE[place]
        panel.plot(
            table.index, table["trained", way], color=colour, marker=MARKERS[place], markersize=4, label=label
        )
        if way != "same_place":
            panel.plot(table.index, table["random", way], ":", color=colour, linewidth=1.2)
    panel.set(title=title, xlabel="layer", ylim=(-0.03, 1.05), xticks=table.index)
    panel.title.set_fontsize(9)
    panel.yaxis.set_major_formatter(PercentFormatter(1))
axes[0].set_ylabel("right correspondents")
handles, labels = axes[0].get_legend_handles_labels()
handles, labels = [*handles, Line2D([], [], color="black", linestyle=":")], [*labels, "dotted: untrained"]
figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
publish(figure, "figure_5_correspondence")

# %%
means = found.groupby(["backbone", "weights", "group", "by"])["value"].mean().unstack()
print("share of right correspondents, mean over layers\n", means.round(3), "\n")
heads = best.groupby(["backbone", "layer", "head"])["value"].mean().groupby("backbone").agg(["median", "max"])
print("query's best key, roped: single heads\n", heads.round(3))
