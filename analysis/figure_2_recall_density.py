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
# # Figure 2: attention recall against density
#
# How much of dense attention its largest entries hold. The paper reports about 85 % at 30 % density (Rolling-
# Forcing, 100 videos, mean and standard deviation over blocks). Entries are chosen by the true weights, in
# two ways: for each query, which bounds what any selector can keep, and in blocks of 16 queries x 32 keys,
# which is what block-sparse kernels run. An untrained model is the control: what it concentrates is no
# property of video. The recall of a selector is 1 - total variation.
#
#     python experiments/redundancy.py frames=96 seeds=2 looks=2 query_blocks=2 name=redundancy_doom
#     python experiments/redundancy.py backbone=scenes data=scenes frames=96 seeds=4 looks=3 \
#         name=redundancy_scenes
#     for data in doom scenes; do python experiments/redundancy.py backbone=$data data=$data checkpoint=random \
#         frames=96 seeds=1 looks=1 query_blocks=2 'method=[dense]' name=redundancy_untrained; done

# %%
from matplotlib.ticker import PercentFormatter

from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import PALETTE
from fastar.results.qualifiers import unfold

RUNS = [RESULTS / f"redundancy_{name}" for name in ("doom", "scenes", "untrained")]
rows = load(RUNS).query("method == 'dense'")
rows = rows.assign(
    model=rows["backbone"].where(rows["weights"] == "trained", rows["backbone"] + ", untrained")
)
print(made_of(RUNS))

# %%
PAPER_DENSITY, PAPER_RECALL = 0.3, 0.85
COLOURS = {"doom": PALETTE[0], "scenes": PALETTE[1]}
PANELS = (
    ("top_recall", "query", "entries of each query: recall"),
    ("top_recall", "blocks", "blocks of 16 x 32: recall"),
    ("top_error", "blocks", "blocks of 16 x 32: output error"),
)


def by_layer(metric, entries):
    """Mean over heads, calls and clips: one line for each model, layer and density."""
    chosen = unfold(rows, metric)
    chosen = chosen[chosen["entries"] == entries]
    return chosen.groupby(["model", "backbone", "layer", "density"])["value"].mean().reset_index()


figure, [axes] = panels(1, 3)
for panel, (metric, entries, title) in zip(axes, PANELS, strict=True):
    for (model, backbone), group in by_layer(metric, entries).groupby(["model", "backbone"], sort=False):
        layers = group.groupby("density")["value"].agg(["mean", "std"])
        untrained = model != backbone
        panel.plot(
            layers.index, layers["mean"], color=COLOURS[backbone], linestyle=":" if untrained else "-",
            marker=None if untrained else "o", markersize=3.5, label=model,
        )  # fmt: skip
        if not untrained:
            low, high = layers["mean"] - layers["std"], layers["mean"] + layers["std"]
            panel.fill_between(
                layers.index, low.clip(lower=0), high if metric == "top_error" else high.clip(upper=1),
                color=COLOURS[backbone], alpha=0.15, linewidth=0,
            )  # fmt: skip
    if metric == "top_recall":
        panel.plot([0, 1], [0, 1], color=PAPER, linewidth=0.8, linestyle="--", label="uniform attention")
        panel.plot(
            PAPER_DENSITY, PAPER_RECALL, "x", color=PAPER, markersize=8, label="paper, Rolling-Forcing"
        )
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set(title=title, xlabel="density", xlim=(0, 1), ylim=(0, None))
    panel.title.set_fontsize(9)
    panel.xaxis.set_major_formatter(PercentFormatter(1))
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
publish(figure, "figure_2_recall_density")

# %% [markdown]
# Lines are means over layers, bands one standard deviation over layers. At 30 % density:

# %%
for metric, entries, title in PANELS:
    table = by_layer(metric, entries)
    table = (
        table[table["density"] == PAPER_DENSITY].groupby("model")["value"].agg(["mean", "std", "min", "max"])
    )
    print(f"{title} at 30 % density, over layers (paper: recall .85)\n{table.round(3)}\n")
