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
# # Figure 9: frames side by side, world model
#
# The paper's figure runs LongVie2. Here: the Doom world model, 160 frames after 64 true ones, free-running, all methods
# but dense in a tenth of the bytes of 192 dense frames; one seed, so a picture of what the methods do, no ranking. The
# walk returns: the last frames show what was seen before. Beside each name, the PSNR on pixels that return (against the
# simulator's truth) and of all pixels (against dense's video; rounding alone, dense on another engine, leaves 64 dB
# over 48 frames: `quality_doom`).
#
#     python experiments/compare.py experiment=demo name=figure_9 seeds=[0] \
#         'method=[dense,tempcache,tempcache_int4,fast_ar,window,random,empty]'
#     python experiments/report.py runs=outputs/figure_9 record=analysis/results/figure_9 stills=8 \
#         curves=false timings=false

# %%
from pathlib import Path

from fastar.results import load, load_runs
from fastar.results.figures import RESULTS, made_of, publish, strips
from fastar.results.stills import STILLS, TRUTH, read_stills, still_frames

RUNS, FRAMES = RESULTS / "figure_9", 8
print(made_of(RUNS))

# %%
METHODS = {
    "dense": "dense, unbounded",
    "tempcache": "TempCache",
    "tempcache_int4": "TempCache, int4",
    "fast_ar": "FAST-AR:\nTempCache, AnnSA",
    "window": "window",
    "random": "random eviction",
    "empty": "no cache",
}
runs = load_runs(RUNS, config=["prefill_frames", "frames"]).set_index("method")
means = load(RUNS).pivot_table(index="method", columns="metric", values="value")[["revisit_psnr", "psnr"]]
first, total = (int(runs[name].iloc[0]) for name in ("prefill_frames", "frames"))
rows = {"truth": read_stills(Path(runs.loc["dense", "folder"]) / TRUTH, FRAMES)}
for method, label in METHODS.items():
    revisit, fidelity = means.loc[method]
    told = f"{label}\n{revisit:.1f} dB" + ("" if method == "dense" else f", {fidelity:.1f} dB")
    rows[told] = read_stills(Path(runs.loc[method, "folder"]) / STILLS, FRAMES)
figure = strips(rows, [f"frame {first + number}" for number in still_frames(total, FRAMES)])
publish(figure, "figure_9_world_model_frames")

# %%
print(means.loc[list(METHODS)].round(1))
