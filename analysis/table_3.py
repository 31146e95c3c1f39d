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
# # Table 3: TempCache against step and chunk caching
#
# The paper follows FlowCache's protocol on MAGI-1 and SkyReels-V2. Neither model nor TeaCache or FlowCache was run
# here, so all quality is the paper's, in italics. What can be checked is whether its speed-ups are the ratios of its
# latencies (`own x`); ours are frames a second at the size of Wan2.1-1.3B with random weights.
#
#     python experiments/benchmark.py mode=rollout

# %%
from fastar.results.figures import publish_page
from fastar.results.paper import beside, latency_ratios, printed
from fastar.results.speed import read_speed
from fastar.results.tables import heading, to_markdown

paper = latency_ratios(printed(3))
speed, made_on = read_speed()
print(made_on)
publish_page(
    "table_3",
    "# Table 3: TempCache against step and chunk caching",
    "In italics: the paper. `own x`: the ratio of its latencies, baseline over method; `printed / own`: its speed-up "
    "over that. Ours, below, is another model, and random weights say nothing about quality.",
    to_markdown(beside(paper, []).rename(columns=heading)),
    "## Ours: Wan2.1-1.3B's size, 480x832",
    "Video frames in the steady state, denoising and commits; `stock` is the backbone's own window of 21 latent "
    "frames. More: [table 1](table_1.md).",
    to_markdown(speed[["method", "ms a frame", "over stock", "over dense", "note"]]),
    made_on + ".",
)
