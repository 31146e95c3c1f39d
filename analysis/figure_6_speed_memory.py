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
# # Figure 6: speed and memory against frames, at the size of Wan2.1-1.3B
#
# The paper's figure runs Rolling-Forcing to 3000 frames on one H100: unbounded dense attention slows down, FAST-AR
# does not. Its teaser gives the ends: 1 hour and 10 minutes. Here: random weights of Wan2.1-1.3B's size at 480x832,
# 84 latent frames (336 video frames), bfloat16, TempCache and a window in 15 % of dense's bytes at 84 latent frames,
# one run each. Crosses are the paper's means over 3000 frames. The dashed line in (b) is the cache of dense alone, by
# count: it does not fit a card of 80 GB beyond about 1,180 video frames. Dense's steps in memory are its buffer, which
# doubles.
#
#     PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python experiments/compare.py \
#         workload=wan_1_3b_speed 'method=[dense,tempcache,window]' name=wan

# %%
import numpy as np

from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE

RUNS = RESULTS / "wan_speed"
rows = load(RUNS).query("protocol == 'C'")
print(made_of(RUNS))

# %%
STRIDE, CHUNK = 4, 3  # video frames to a latent frame, latent frames to a chunk
PAPER_FRAMES, PAPER_MINUTES = 3000, {"dense": 60, "FAST-AR": 10}
CARD = 79.2  # GiB that an H100 of 80 GB has
METHODS = {"dense": "dense, unbounded", "tempcache": "TempCache", "window": "window, equal bytes"}


def curve(metric, method):
    """Video frames at the end of each chunk, and the metric."""
    chosen = rows.query("metric == @metric and method == @method and chunk.notna()").sort_values("chunk")
    return STRIDE * (chosen["frame"].astype(float) + CHUNK), chosen["value"]


figure, [[speed, memory]] = panels(1, 2, width=4.4, height=3.1)
for place, (method, label) in enumerate(METHODS.items()):
    style = {"color": PALETTE[place], "marker": MARKERS[place], "markersize": 3.5, "linewidth": 1.3}
    frames, rate = curve("fps_chunk", method)
    speed.plot(frames, STRIDE * rate, label=label, **style)
    frames, peak = curve("peak_chunk", method)
    memory.plot(frames, peak / 2**30, label=label, **style)
for name, minutes in PAPER_MINUTES.items():
    rate = PAPER_FRAMES / (60 * minutes)
    speed.plot(PAPER_FRAMES, rate, "x", color=PAPER, markersize=8)
    speed.annotate(
        f"paper, {name}:\n{rate:.2g} over {PAPER_FRAMES} frames", (PAPER_FRAMES, rate), (-8, 0),
        textcoords="offset points", ha="right", va="center", fontsize=7.5, color=PAPER,
    )  # fmt: skip
frames, held = curve("cache_bytes", "dense")
per_frame = float((held / frames).iloc[-1]) / 2**30
line = np.array([frames.iloc[0], PAPER_FRAMES])
memory.plot(
    line, per_frame * line, "--", color=PALETTE[0], linewidth=1, label="dense's cache alone, by count"
)
memory.axhline(CARD, color=PALETTE[-2], linewidth=0.8, linestyle=":")
memory.text(90, CARD * 1.06, "a card of 80 GB", fontsize=7.5)
speed.set(title="(a) video frames a second", ylabel="1/s", ylim=(0.5, 40))
memory.set(title="(b) peak memory of a chunk", ylabel="GiB", ylim=(4, 300))
for panel in (speed, memory):
    panel.title.set_fontsize(9)
    panel.set(
        xscale="log", yscale="log", xlim=(80, 3600), xlabel="video frames", xticks=[100, 300, 1000, 3000]
    )
    panel.set_xticklabels(["100", "300", "1000", "3000"])
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=7.5)
speed.set_yticks([0.5, 1, 2, 5, 10, 20, 40], labels=["0.5", "1", "2", "5", "10", "20", "40"])
memory.set_yticks([5, 10, 20, 50, 100, 200], labels=["5", "10", "20", "50", "100", "200"])
publish(figure, "figure_6_speed_memory")

# %%
whole = rows[rows["metric"].isin(["fps", "fps_denoise", "peak_allocated"])].pivot_table(
    index="method", columns="metric", values="value"
)
whole["peak_allocated"] /= 2**30
print("latent frames a second over the run; peak memory in GiB\n", whole.round(2), "\n")
print(
    f"dense's cache: {STRIDE * per_frame:.3f} GiB a latent frame, "
    f"{per_frame * PAPER_FRAMES:.0f} GiB at {PAPER_FRAMES} video frames; "
    f"{CARD:.1f} GiB are full at {CARD / per_frame:.0f}"
)
