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
# # Figure 8: speed and memory against frames, world model
#
# The paper's figure runs LongVie2; its teaser gives 500 frames in 11 minutes with dense attention, in 2 with FAST-AR,
# in 6 with FlowCache and RadialAttention. Here: the Doom world model, 1000 frames after four true ones, float32, free
# of any bound for dense, in the bytes of 29 frames for the others; one run each. (a) Median rate of 20 chunks of four
# frames. (b) What the cache keeps. (c) Time over dense's until then: below one a method has paid off; crosses
# are the paper's.
#
#     python experiments/compare.py experiment=bounded

# %%
from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import DASHES, PALETTE

RUNS = RESULTS / "bounded"
rows = load(RUNS).query("protocol == 'C'")
print(made_of(RUNS))

# %%
CHUNK, SMOOTH = 4, 20
PAPER_FRAMES, PAPER_OVER_DENSE = 500, {"FAST-AR": 2 / 11, "FlowCache + Radial": 6 / 11}
METHODS = {
    "dense": "dense, unbounded",
    "window": "window",
    "tempcache": "TempCache",
    "tempcache_int4": "TempCache, int4",
    "fast_ar": "FAST-AR: TempCache, AnnSA",
}


def by_frame(metric):
    """A line per last frame of a chunk, a column per method."""
    chosen = rows[(rows["metric"] == metric) & rows["chunk"].notna()]
    return chosen.pivot_table(index="frame", columns="method", values="value")


seconds = by_frame("chunk_s")
kept = by_frame("cache_bytes")
spent = seconds.cumsum()
smooth = (CHUNK / seconds).rolling(SMOOTH, center=True, min_periods=SMOOTH // 2).median()
over = spent.div(spent["dense"], axis=0)
figure, [[speed, memory, time]] = panels(1, 3, width=3.5)
for place, (method, label) in enumerate(METHODS.items()):
    style = {"color": PALETTE[place], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.4}
    speed.plot(smooth.index.astype(float), smooth[method], label=label, **style)
    memory.plot(kept.index.astype(float), kept[method] / 2**20, **style)
    time.plot(over.index.astype(float), over[method], **style)
for mark, (name, ratio) in zip("x+", PAPER_OVER_DENSE.items(), strict=True):
    time.plot(PAPER_FRAMES, ratio, mark, color=PAPER, markersize=8, label=f"paper, {name}")
time.legend(frameon=False, fontsize=7.5, loc="upper right")
speed.set(title="(a) frames a second", ylabel="1/s", ylim=(0, None))
memory.set(title="(b) cache", ylabel="MiB", yscale="log")
time.set(title="(c) time until here / dense's", ylim=(0, None))
for panel in (speed, memory, time):
    panel.title.set_fontsize(9)
    panel.set(xlabel="frame")
handles, labels = speed.get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
publish(figure, "figure_8_world_model")

# %%
print("seconds over the run\n", spent.iloc[-1].round(1), "\n")
for method in METHODS:
    behind = over.index[over[method] > 1]
    print(
        f"{method}: {over[method].iloc[-1]:.2f} of dense's time; last behind it at frame {max(behind, default='-')}"
    )
print("\nseconds a chunk, median of the first and the last fifth")
print(seconds.iloc[:50].median().round(3).to_frame("first").assign(last=seconds.iloc[-50:].median().round(3)))
