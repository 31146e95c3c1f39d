"""Plots of a comparison, from the tidy table: curves over the rollout, and quality against cost."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from fastar.data.video import save_png
from fastar.metrics.names import METRICS, shown_as
from fastar.results.tables import UNITS, spread

# Okabe and Ito's palette, which colour-blind readers can tell apart
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MAX_BANDS = 6  # more of them hide each other
MARKERS, DASHES = "osD^vP", ("-", "--", ":", "-.")  # the second, third, ... line of a colour
WIDE = 4.0  # ratio of the largest to the smallest cost from which on their axis is logarithmic
NARROW = 1.1  # the same ratio below which they are shown as equal
STEP = 0.012  # of the cost: how far apart lines over settings stand, as equal budgets would hide one behind the other


def colours_of(lines: Sequence[str]) -> dict[str, str]:
    """One colour per line, by order: give the same order to all figures of a report."""
    return {line: PALETTE[number % len(PALETTE)] for number, line in enumerate(lines)}


def plot_curves(
    rows: pd.DataFrame,
    metric: str,
    path: str | Path,
    *,
    index: str = "method",
    units: Sequence[str] = UNITS,
    colours: Mapping[str, str] | None = None,
    log: bool = False,
    title: str | None = None,
) -> Path:
    """`metric` against the frame index, one line per `index` with its bootstrap band; writes a picture to `path`."""
    stats = spread(rows[rows["frame"].notna()], index=[index, "frame"], metrics=[metric], units=units)
    stats[["mean", "low", "high"]] /= shown_as(metric)[0]
    if stats.empty:
        raise ValueError(f"no rows of {metric} with a frame index: log it per chunk, with frame=...")
    figure, axes = _figure(metric, title)
    colours = colours or colours_of([str(line) for line in stats[index].unique()])
    lines = stats[index].nunique()
    for order, (line, group) in enumerate(stats.groupby(index, sort=False)):
        group = group.sort_values("frame")
        frame = group["frame"].astype(float)
        # later lines are thinner: equal ones show as a core in a rim
        width = 5.0 - 3.8 * order / max(lines - 1, 1)
        dash = DASHES[_round_of(colours, str(line)) % len(DASHES)]
        axes.plot(
            frame, group["mean"], color=colours[str(line)], label=str(line), linewidth=width, linestyle=dash
        )
        if lines <= MAX_BANDS:
            axes.fill_between(
                frame, group["low"], group["high"], color=colours[str(line)], alpha=0.15, linewidth=0
            )
    axes.set_xlabel("frame")
    if log:
        axes.set_yscale("log")
    elif stats["mean"].min() >= 0:
        axes.set_ylim(bottom=0)
    return _save(figure, axes, path)


def plot_frontier(
    rows: pd.DataFrame,
    cost: str,
    quality: str,
    path: str | Path,
    *,
    index: str = "method",
    setting: str | None = None,
    units: Sequence[str] = UNITS,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    label: str | None = None,
    across: Collection[str] = (),
) -> Path:
    """Mean `quality` with its interval against mean `cost`; joins points of one `index` that differ in `setting`.

    `label` stands beside the axis of `quality` in place of its name. Lines that `across` names are dotted ones over the
    whole picture, whatever they cost: what all others are to be held against. Costs over a wide range get a logarithmic
    axis, on which joined lines stand a little apart. Where the axis does not reach zero, so is what costs nothing.
    """
    keys = [index] if setting is None else [index, setting]
    stats = spread(rows, index=keys, metrics=[cost, quality], units=units)
    costs = stats[stats["metric"] == cost][[*keys, "mean"]].rename(columns={"mean": "cost"})
    points = stats[stats["metric"] == quality].merge(costs, on=keys)
    points["cost"] /= shown_as(cost)[0]
    points[["mean", "low", "high"]] /= shown_as(quality)[0]
    if points.empty:
        raise ValueError(f"no {index} has both {cost} and {quality}")
    figure, axes = _figure(quality, title)
    if label is not None:
        axes.set_ylabel(label)
    colours = colours or colours_of([str(line) for line in points[index].unique()])
    paid = points.loc[points["cost"] > 0, "cost"]
    if wide := len(paid) > 0 and paid.max() > WIDE * paid.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif len(paid):
        axes.ticklabel_format(axis="x", useOffset=False)
    if narrow := len(paid) > 0 and paid.max() < NARROW * paid.min():
        axes.set_xlim(0.5 * paid.min(), 1.5 * paid.max())
    lines = points[index].nunique()
    for order, (line, group) in enumerate(points.groupby(index, sort=False)):
        group = group.sort_values("cost")
        if line in across or ((wide or narrow) and (group["cost"] == 0).all()):
            axes.axhline(
                group["mean"].mean(), color=colours[str(line)], linestyle=":", linewidth=1.4, label=str(line)
            )
            continue
        reach = [(group["mean"] - group["low"]).fillna(0), (group["high"] - group["mean"]).fillna(0)]
        aside = 1 + STEP * (order - (lines - 1) / 2) if wide and setting else 1
        earlier = _round_of(colours, str(line))
        axes.errorbar(
            group["cost"] * aside, group["mean"], yerr=reach, color=colours[str(line)], label=str(line),
            marker=MARKERS[earlier % len(MARKERS)], markersize=5, markerfacecolor="white" if earlier else None,
            linewidth=1.4 if setting else 0, elinewidth=1.4, capsize=2,
        )  # fmt: skip
    axes.set_xlabel(_axis_label(cost))
    return _save(figure, axes, path)


def plot_setting(
    rows: pd.DataFrame,
    setting: str,
    metric: str,
    path: str | Path,
    *,
    index: str = "method",
    units: Sequence[str] = UNITS,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Mean `metric` with its interval against the column `setting`, one line per `index`.

    Numbers stand on an axis in proportion, anything else side by side. A line that lacks the setting is drawn level.
    """
    stats = spread(rows, index=[index, setting], metrics=[metric], units=units)
    stats[["mean", "low", "high"]] /= shown_as(metric)[0]
    figure, axes = _figure(metric, title)
    colours = colours or colours_of([str(line) for line in stats[index].unique()])
    known = stats[setting].dropna()
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    places = {value: value if numeric else place for place, value in enumerate(dict.fromkeys(known))}
    for line, group in stats.groupby(index, sort=False):
        varied = group[group[setting].notna()]
        if varied.empty:
            axes.axhline(
                group["mean"].mean(), color=colours[str(line)], linestyle=":", linewidth=1.4, label=str(line)
            )
            continue
        varied = varied.assign(place=varied[setting].map(places)).sort_values("place")
        reach = [(varied["mean"] - varied["low"]).fillna(0), (varied["high"] - varied["mean"]).fillna(0)]
        axes.errorbar(
            varied["place"].astype(float), varied["mean"], yerr=reach, color=colours[str(line)], label=str(line),
            marker="o", markersize=5, linewidth=1.4 if numeric else 0, elinewidth=1.4, capsize=2,
        )  # fmt: skip
    if not numeric:
        names = [str(value) for value in places]
        slanted = sum(map(len, names)) > 40  # side by side they would overlap
        axes.set_xticks(list(places.values()), names)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=15, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(setting.replace("_", " "))
    return _save(figure, axes, path)


def _round_of(colours: Mapping[str, str], line: str) -> int:
    """How many earlier lines have the same colour."""
    earlier = list(colours)[: list(colours).index(line)]
    return sum(colours[other] == colours[line] for other in earlier)


def _figure(metric: str, title: str | None = None) -> tuple[Figure, Axes]:
    figure = Figure(
        figsize=(6.4, 3.8), dpi=150, layout="constrained"
    )  # no pyplot: nothing global, no display
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_ylabel(_axis_label(metric))
    if title is not None:
        axes.set_title(title, fontsize=9, loc="left")
    return figure, axes


def _axis_label(metric: str) -> str:
    info = METRICS.get(metric.split("/")[0])
    unit = shown_as(metric)[1]
    arrow = f", {info.better} is better" if info and info.better else ""
    return f"{metric.replace('_', ' ').replace('/', ', ')}{f' ({unit})' if unit else ''}{arrow}"


def _save(figure: Figure, axes: Axes, path: str | Path) -> Path:
    # beside the axes: inside, many methods would cover the data
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return path


def save_figure(figure: Figure, path: str | Path, *, dpi: float | None = None) -> None:
    """Write a figure as a PNG in 256 colours, a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    if dpi is not None:
        figure.set_dpi(dpi)
    canvas.draw()
    save_png(path, Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
