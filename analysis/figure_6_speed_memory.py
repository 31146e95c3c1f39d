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
# does not. Its teaser gives the ends: 1 hour and 10 minutes. Here: random weights of Wan2.1-1.3B's size at 480x832 on
# one H100, bfloat16, fused and captured passes, cache contents from recorded motion. Dense's cache fits no card beyond
# about 1,180 video frames: its passes were timed with one layer's cache read by all 30 layers (hollow marks), which
# takes the same time. Bounded methods were timed full, after some 400 video frames; that they stay as they are was
# tried to 57,600 frames with 3 of the layers (the last 1,008 frames 1.007 times as fast as the first). Crosses are the
# paper's means over 3000 frames, of another model in its own code: the slopes are to be held beside each other, not the
# heights.
#
#     python experiments/benchmark.py mode=record
#     python experiments/benchmark.py mode=rollout +backbone.transformer.numerics=self_forcing \
#         'method=[stock,tempcache_fast,tempcache_annsa_sparse_commits,window,tempcache_annsa_fast,tempcache_fastest]' \
#         'budgets=[6,18,3.1,12]' steady.repeats=2 'decoders=[light]'

# %%
import numpy as np

from fastar.results.figures import PAPER, panels, publish
from fastar.results.plots import DASHES, MARKERS, PALETTE
from fastar.results.speed import rollout_rows

rows, made_on = rollout_rows()
print(f"{made_on}; seeds 0")

# %%
STRIDE, CHUNK, STEPS = 4, 3, 4  # video frames to a latent frame, latent frames to a chunk, denoising passes
PAPER_FRAMES, PAPER_MINUTES = 3000, {"dense": 60, "FAST-AR": 10}
CARD = 79.2  # GiB that an H100 of 80 GB has
FULL = 400  # video frames after which bounded methods were timed
BOUNDED = {
    ("window", 6): "window, 6 latent frames",
    ("tempcache_fast", 6): "TempCache, 6",
    ("tempcache_annsa_fast", 6): "TempCache, 6, and AnnSA",
    ("tempcache_annsa_fast", 18): "TempCache, 18, and AnnSA",
    ("stock", None): "stock window, 21",
}
timed = [row for row in rows if row["method"] == "dense, shared" and "latent_frames" in row]
timed = [row for row in timed if row["latent_frames"]]
frames = np.array([STRIDE * row["latent_frames"] for row in timed])
rate = np.array([1e3 * STRIDE * CHUNK / ((STEPS + 1) * row["pass_ms"]) for row in timed])
held = np.array([row["cache_gib"] for row in timed])

figure, [[speed, memory]] = panels(1, 2, width=4.6, height=3.3)
dense = {"color": PALETTE[0], "marker": "o", "markerfacecolor": "white", "markersize": 5, "linewidth": 1.3}
speed.plot(frames, rate, label="dense, unbounded; (b): its cache alone", **dense)
memory.plot(frames, held, **dense)
for place, ((method, budget), label) in enumerate(BOUNDED.items(), start=1):
    [row] = [row for row in rows if (row["method"], row.get("budget")) == (method, budget)]
    style = {
        "color": PALETTE[place],
        "linewidth": 1.3,
        "linestyle": DASHES[place % len(DASHES)],
        "label": label,
    }
    mark = {"color": PALETTE[place], "marker": MARKERS[place], "markersize": 5}
    for panel, value in ((speed, row["fps_commit"]), (memory, row["peak_allocated"] / 2**30)):
        panel.plot([FULL, PAPER_FRAMES], [value, value], **style)
        panel.plot(FULL, value, **mark)
for name, minutes in PAPER_MINUTES.items():
    paper_rate = PAPER_FRAMES / (60 * minutes)
    speed.plot(PAPER_FRAMES, paper_rate, "x", color=PAPER, markersize=8)
    speed.annotate(
        f"paper, {name}:\n{paper_rate:.2g} over {PAPER_FRAMES} frames", (PAPER_FRAMES, paper_rate), (-8, 0),
        textcoords="offset points", ha="right", va="center", fontsize=7.5, color=PAPER,
    )  # fmt: skip
memory.axhline(CARD, color=PALETTE[-2], linewidth=0.8, linestyle=":")
memory.text(210, CARD * 1.07, "a card of 80 GB", fontsize=7.5)
speed.set(title="(a) video frames a second", ylabel="1/s", ylim=(0.5, 90))
memory.set(title="(b) peak memory, weights included", ylabel="GiB", ylim=(4, 300))
for panel in (speed, memory):
    panel.title.set_fontsize(9)
    panel.set(xscale="log", yscale="log", xlim=(200, 3600), xlabel="video frames", xticks=[300, 1000, 3000])
    panel.set_xticklabels(["300", "1000", "3000"])
    panel.minorticks_off()
speed.set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5", "1", "2", "5", "10", "20", "50"])
memory.set_yticks([5, 10, 20, 50, 100, 200], labels=["5", "10", "20", "50", "100", "200"])
handles, labels = speed.get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
publish(figure, "figure_6_speed_memory")

# %%
[over] = [row for row in rows if row["method"] == "dense, shared" and "over_video_frames" in row]
print(f"dense over {over['over_video_frames']} video frames: {over['fps']:.2f} a second ({over['note']})")
print(
    f"dense's cache: {held[0] / frames[0] * STRIDE:.3f} GiB a latent frame; full at {CARD * frames[0] / held[0]:.0f}"
)
for (method, budget), label in BOUNDED.items():
    [row] = [row for row in rows if (row["method"], row.get("budget")) == (method, budget)]
    print(f"{label}: {row['fps_commit']:.1f} a second, {row['peak_allocated'] / 2**30:.1f} GiB")
