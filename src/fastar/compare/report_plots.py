"""The plots of a report: speed and memory over frames; quality against bytes, against work, and against settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastar.metrics.names import decimals_of
from fastar.results.plots import colours_of, plot_curves, plot_frontier, plot_setting

DENSE, TO_DENSE = "dense", "psnr"
# Dense in other arithmetic: how far rounding alone leads a free-running rollout away. Nothing can be told to be nearer.
CHAOS_FLOOR = ("dense_reference", "dense_merged")
ABLATED = (
    "psnr", "revisit_psnr", "latent_error", "recall", "slot_share/end", "density", "fps/steady", "prompt_share",
    "prompt_recall",
)  # fmt: skip
WORK = {
    "prompt_share": ("words", (TO_DENSE, "prompt_recall", "prompt_mass", "presence")),
    "density": ("pairs", (TO_DENSE, "recall")),
}

PROTOCOLS = {
    "A": "protocol A: dense past, the method only denoises",
    "B": "protocol B: dense trajectory through the method's own cache",
    "C": "protocol C: free-running",
}


def protocols(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Each protocol's letter, meaning and rows; not C if it only served to make the dense trajectory."""
    for protocol, meaning in PROTOCOLS.items():
        part = rows[rows["protocol"] == protocol]
        if len(part) and (part["method"].nunique() > 1 or rows["method"].nunique() == 1):
            yield protocol, meaning, part


def costs(
    folder: Path, rows: pd.DataFrame, here: pd.DataFrame, colours: Mapping[str, str]
) -> dict[str, Path]:
    """Speed and memory over the frames of `here`; quality against bytes, of all budgets in `rows`."""
    images: dict[str, Path] = {}
    free = here[here["protocol"] == "C"]
    times = free[free["metric"] == "chunk_s"]
    if times["frame"].nunique() > 1 and "C" in {letter for letter, *_ in protocols(rows)}:
        chunk = int(times["frame"].drop_duplicates().sort_values().diff().min())
        rates = times.assign(metric="fps", value=chunk / times["value"])
        for name, table, metric in (("fps_frames", rates, "fps"), ("memory_frames", free, "cache_bytes")):
            images[name] = plot_curves(table, metric, folder / f"{name}.png", colours=colours)
    setting = "budget_share" if rows["budget_share"].nunique() > 1 else None
    for protocol, meaning, part in protocols(rows):
        for name, metric in (("fidelity_bytes", TO_DENSE), ("revisit_bytes", "revisit_psnr")):
            scored, label = part, None
            if metric == TO_DENSE:
                scored = part[part["method"] != DENSE]
            elif DENSE in set(part["method"]) and part["method"].nunique() > 1:
                scored, label = minus_dense(part, metric), f"{metric.replace('_', ' ')} minus dense's (dB)"
            if (
                varies(part, "cache_bytes/end")
                and scored.loc[scored["metric"] == metric, "value"].notna().any()
            ):
                path = folder / f"{name}_{protocol}.png"
                images[f"{name}_{protocol}"] = plot_frontier(
                    scored, "cache_bytes/end", metric, path,
                    setting=setting, colours=colours, title=meaning, label=label,
                    across=CHAOS_FLOOR if (protocol, metric) == ("C", TO_DENSE) else (),
                )  # fmt: skip
    return images


def work(folder: Path, rows: pd.DataFrame) -> dict[str, Path]:
    """Quality, attention and truth against the share of the prompt that is read, and of the pairs that are computed.

    Each where methods differ in it and caches do not: under a budget the pairs follow from the bytes.
    """
    images: dict[str, Path] = {}
    colours = colours_of(rows["variant_of"].unique())
    for protocol, meaning, part in protocols(rows):
        selecting = part[part["variant_of"] != DENSE]
        for cost, (prefix, metrics) in WORK.items():
            if not varies(part, cost) or varies(part, "cache_bytes/end"):
                continue
            for metric in metrics:
                if selecting.loc[selecting["metric"] == metric, "value"].notna().any():
                    name = f"{prefix}_{metric}_{protocol}"
                    images[name] = plot_frontier(
                        selecting, cost, metric, folder / f"{name}.png",
                        index="variant_of", setting="method", colours=colours, title=meaning,
                        across=CHAOS_FLOOR if (protocol, metric) == ("C", TO_DENSE) else (),
                    )  # fmt: skip
    return images


def ablations(folder: Path, here: pd.DataFrame, varied: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Quality and cost against each setting in which runs of a method differ, a line for each of the other settings."""
    images: dict[str, Path] = {}
    for setting in dict.fromkeys(name for settings in varied.values() for name in settings):
        others = {
            run: "".join(f" {name}={value}" for name, value in settings.items() if name != setting)
            for run, settings in varied.items()
        }
        has = here["run_id"].map(lambda run, name=setting: name in varied[run])
        curve = here["variant_of"] + here["run_id"].map(others)
        rows = here.assign(curve=curve, **{setting: here[setting].where(has)})
        colours = colours_of(curve.unique())
        for protocol, meaning, part in protocols(rows):
            capped = (part["metric"] == TO_DENSE) & (part["variant_of"] == DENSE)
            part = part[~capped]
            for metric in ABLATED:
                if varies(part, metric):
                    name = f"{setting}_{metric.replace('/', '_')}_{protocol}"
                    path = folder / f"{name}.png"
                    images[name] = plot_setting(
                        part, setting, metric, path, index="curve", colours=colours, title=meaning
                    )
    return images


def varies(rows: pd.DataFrame, metric: str) -> bool:
    """Whether methods differ in `metric`, to the decimals that are shown; a single method always does."""
    scored = rows[(rows["metric"] == metric) & rows["value"].notna()]
    means = scored.groupby("method")["value"].mean().round(decimals_of(metric))
    return len(scored) > 0 and (rows["method"].nunique() == 1 or means.nunique() > 1)


def minus_dense(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of the other methods, with dense's `metric` on the same seed taken off theirs.

    Seeds are different places, which differ by far more than methods do: intervals of the plain score hide that.
    """
    scores = rows[rows["metric"] == metric]
    dense = scores[scores["method"] == DENSE].groupby("seed")["value"].mean()
    others = rows[rows["method"] != DENSE]
    gap = others["value"] - others["seed"].map(dense).astype(float)
    return others.assign(value=others["value"].where(others["metric"] != metric, gap))
