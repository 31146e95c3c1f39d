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
# # Table 4: bidirectional clips of five seconds
#
# HunyuanVideo and Wan2.1-14B make these clips in one piece, without a cache; nothing here runs them, so no line is
# ours. What can be checked is whether the paper's speed-ups are the ratios of its latencies (`own x`).

# %%
from fastar.results.figures import publish_page
from fastar.results.paper import beside, latency_ratios, printed
from fastar.results.tables import heading, to_markdown

paper = latency_ratios(printed(4))
print(paper[["model", "method", "speed-up x", "own x", "printed / own"]].to_string(index=False))
publish_page(
    "table_4",
    "# Table 4: bidirectional clips of five seconds",
    "In italics: the paper; nothing of it was measured here. `own x`: the ratio of its latencies, original over "
    "method; `printed / own`: its speed-up over that.",
    to_markdown(beside(paper, []).rename(columns=heading)),
)
