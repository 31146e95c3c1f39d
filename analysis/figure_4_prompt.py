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
# # Figure 4: what a frame reads of its prompt
#
# The paper shows maps of the cross-attention of single tokens over the frames of one long prompt: few tokens matter
# to a frame. Maps were not recorded here; their measures were, on scripted scenes, where it is known which words
# matter to a frame. (a) How many tokens carry the attention: exp of its entropy over the prompt's own tokens.
# (b) The prompt is padded to 512 tokens as Wan's is, and padding is attended to. (c) Attention mass, and (d) the
# words that matter, against the tokens read, by methods that choose them (protocol A, layers and heads averaged, mean
# over clips with 95 % intervals). An untrained model is the control in (a) and (b).
#
#     python experiments/redundancy.py backbone=scenes data=scenes frames=96 seeds=4 looks=3 name=redundancy_scenes
#     python experiments/redundancy.py backbone=scenes data=scenes checkpoint=random frames=96 seeds=1 looks=1 \
#         query_blocks=2 'method=[dense]' name=redundancy_untrained
#     python experiments/compare.py -m experiment=annca_bits
#     python experiments/compare.py -m experiment=annca_quantized seeds=4 batch=4
#     python experiments/compare.py -m experiment=prompt_tokens

# %%
from matplotlib.ticker import PercentFormatter

from fastar.results import load
from fastar.results.figures import PAPER, RESULTS, made_of, panels, publish
from fastar.results.plots import MARKERS, PALETTE
from fastar.results.qualifiers import unfold
from fastar.results.tables import spread

LOOKS = [RESULTS / f"redundancy_{name}" for name in ("scenes", "untrained")]
SWEEPS = {name: RESULTS / name for name in ("annca_bits", "annca_quantized", "prompt_tokens")}
looks = load(LOOKS).query("method == 'dense' and backbone == 'scenes'")
sweeps = {name: load(folder).query("protocol == 'A'") for name, folder in SWEEPS.items()}
print("a, b:", made_of(LOOKS))
for name, folder in SWEEPS.items():
    print(f"{name}: {made_of(folder)}")

# %%
PAPER_DENSITY, PAPER_RECALL = 0.331, 0.942  # AnnCA-LSH, table 1
LINES = (
    ("prompt_tokens", "ranked_mass", "prompt_share", "exact mass, one choice for all heads"),
    ("prompt_tokens", "ranked_lsh", "prompt_share", "16 hash tables, one choice for all heads"),
    ("annca_bits", "annca", "bits", "AnnCA-LSH, 3 to 12 bits"),
    ("annca_quantized", "annca_quantized", "dims", "AnnCA-Quant, 6 to 10 bits"),
    ("prompt_tokens", "random_tokens", "prompt_share", "random tokens"),
)


def by_layer(metric):
    """Mean over clips: a line per layer, a column for trained and untrained weights."""
    return unfold(looks, metric).pivot_table(index="layer", columns="weights", values="value")


figure, [[effective, padding], [mass, words]] = panels(2, 2, width=4.2, height=2.8)
for panel, metric in ((effective, "prompt_effective_share"), (padding, "prompt_padding_mass")):
    table = by_layer(metric)
    panel.plot(table.index, table["trained"], "o-", color=PALETTE[0], label="trained", markersize=4.5)
    panel.plot(table.index, table["random"], ":", color=PALETTE[0], label="untrained")
    panel.set(xlabel="layer", ylim=(0, 1), xticks=table.index)
share = by_layer("prompt_padding_share")["trained"]
padding.plot(share.index, share, "--", color=PAPER, linewidth=1, label="padding / tokens, trained")
effective.set(title="(a) effective tokens / tokens of the prompt")
padding.set(title="(b) attention to padding / to all 512 tokens")

for panel, metric in ((mass, "prompt_mass"), (words, "prompt_recall")):
    for place, (record, method, setting, label) in enumerate(LINES):
        chosen = sweeps[record][sweeps[record]["method"] == method]
        stats = spread(chosen, index=setting, metrics=[metric, "prompt_share"])
        read = stats[stats["metric"] == "prompt_share"].set_index(setting)["mean"]
        kept = stats[stats["metric"] == metric].set_index(setting).assign(read=read).sort_values("read")
        panel.errorbar(
            kept["read"], kept["mean"], yerr=[kept["mean"] - kept["low"], kept["high"] - kept["mean"]],
            color=PALETTE[place], marker=MARKERS[place], markersize=4.5, linewidth=1.2, capsize=2, label=label,
        )  # fmt: skip
    panel.plot([0, 1], [0, 1], "--", color=PAPER, linewidth=0.8)
    panel.set(xlabel="tokens read / tokens of the prompt", xlim=(0, 0.8), ylim=(0, 1.05))
    panel.xaxis.set_major_formatter(PercentFormatter(1))
mass.plot(PAPER_DENSITY, PAPER_RECALL, "x", color=PAPER, markersize=8, label="paper, AnnCA-LSH (density)")
mass.set(title="(c) attention mass of the tokens read")
words.set(title="(d) words that matter to the frame and are read")
for panel in (effective, padding, mass, words):
    panel.title.set_fontsize(9)
    panel.yaxis.set_major_formatter(PercentFormatter(1))
for panel in (effective, padding):
    panel.legend(frameon=False, fontsize=7.5)
handles, labels = mass.get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
publish(figure, "figure_4_prompt")

# %%
for metric in ("prompt_effective", "prompt_effective_share", "prompt_padding_mass", "prompt_padding_share"):
    print(f"{metric}, by layer\n{by_layer(metric).round(3).T}\n")
