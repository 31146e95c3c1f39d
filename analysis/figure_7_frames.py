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
# # Figure 7: frames side by side, text to video
#
# The paper's figure runs Rolling-Forcing. Here: the text-to-video model of scripted scenes, 92 frames after four true
# ones from one held-out prompt, free-running; bounded methods in 15 % of the bytes of 96 dense frames, AnnCA's ranked
# form reads 35 % of the prompt's tokens; one seed, so a picture and no ranking. Beside each name the PSNR of all pixels
# to dense's video; rounding alone, dense on another engine, leaves 65 dB (`quality_scenes`).
#
#     python experiments/compare.py workload=scenes name=figure_7 'protocols=[C]' seeds=[0] batch=1 videos=1 \
#         'method=[dense,tempcache,annsa,ranked_lsh,fast_ar,window,random,empty]'
#     python experiments/report.py runs=outputs/figure_7 record=analysis/results/figure_7 stills=8 \
#         curves=false timings=false

# %%
from pathlib import Path

from fastar.results import load, load_runs
from fastar.results.figures import RESULTS, made_of, publish, strips
from fastar.results.stills import STILLS, TRUTH, read_stills, still_frames

RUNS, FRAMES = RESULTS / "figure_7", 8
print(made_of(RUNS))

# %%
METHODS = {
    "dense": "dense, unbounded",
    "tempcache": "TempCache",
    "annsa": "AnnSA",
    "ranked_lsh": "AnnCA, ranked",
    "fast_ar": "FAST-AR:\nTempCache, AnnSA",
    "window": "window",
    "random": "random eviction",
    "empty": "no cache",
}
runs = load_runs(RUNS, config=["prefill_frames", "frames"]).set_index("method")
fidelity = load(RUNS).query("metric == 'psnr'").groupby("method")["value"].mean()
first, total = (int(runs[name].iloc[0]) for name in ("prefill_frames", "frames"))
rows = {"script, drawn": read_stills(Path(runs.loc["dense", "folder"]) / TRUTH, FRAMES)}
for method, label in METHODS.items():
    told = label if method == "dense" else f"{label}\n{fidelity[method]:.1f} dB"
    rows[told] = read_stills(Path(runs.loc[method, "folder"]) / STILLS, FRAMES)
figure = strips(rows, [f"frame {first + number}" for number in still_frames(total, FRAMES)])
publish(figure, "figure_7_frames")

# %%
print(fidelity.reindex(list(METHODS)).round(1))
