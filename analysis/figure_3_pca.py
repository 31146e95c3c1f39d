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
# # Figure 3: principal components of queries and cached keys over frames
#
# The paper shows that both keep their colours from frame to frame, and takes that as the sign of redundancy.
# Here: the first frames of the last five chunks of one held-out clip, queries and keys before RoPE, all heads
# of one layer together, components taken over the five frames. Red, green and blue are the first three
# components, each from its lowest to its highest value. What the colours cannot show is how far the same
# patterns belong to the place in the picture rather than to what is seen there: the printed shares of
# variance tell.
#
#     python experiments/redundancy.py frames=96 seeds=2 looks=2 query_blocks=2 name=redundancy_doom
#     python experiments/redundancy.py backbone=scenes data=scenes frames=96 seeds=4 looks=3 name=redundancy_scenes

# %%
import numpy as np

from fastar.results import load
from fastar.results.figures import RESULTS, made_of, panels, publish
from fastar.results.qualifiers import unfold

RUNS = [RESULTS / f"redundancy_{name}" for name in ("doom", "scenes")]
GRID = (6, 8)  # tokens of a frame
rows = load(RUNS)
points = unfold(rows, "pca")
frames = sorted(points["frame"].unique())
print(made_of(RUNS))

# %%
figure, axes = panels(4, len(frames), width=1.45, height=1.25)
shares = {}
for row, (backbone, of) in enumerate((b, of) for b in ("doom", "scenes") for of in ("query", "key")):
    chosen = points[(points["backbone"] == backbone) & (points["of"] == of)]
    wide = chosen.pivot_table(index=["frame", "token"], columns="component", values="value")
    low, high = wide.min(), wide.max()
    colours = ((wide - low) / (high - low)).to_numpy().reshape(len(frames), *GRID, 3)
    # what a picture that is the same in every frame explains of them
    shares[backbone, of] = np.var(colours.mean(0), axis=(0, 1)).sum() / np.var(colours, axis=(0, 1, 2)).sum()
    for column, picture in enumerate(colours):
        panel = axes[row][column]
        panel.imshow(picture, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        panel.spines[:].set_visible(False)
        if row == 0:
            panel.set_title(f"frame {frames[column]}", fontsize=8)
    axes[row][0].set_ylabel(f"{backbone}\n{'queries' if of == 'query' else 'cached keys'}", fontsize=8)
publish(figure, "figure_3_pca")

# %%
variance = unfold(rows, "pca_variance").groupby(["backbone", "of", "component"])["value"].mean().unstack()
print("share of the variance along each component\n", variance.round(3), "\n")
print("share of the colours' variance that one picture, the same in all five frames, explains")
for (backbone, of), share in shares.items():
    print(f"  {backbone}, {of}: {share:.2f}")
