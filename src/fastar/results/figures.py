"""What the notebooks of analysis/ share: where results, figures and tables are, panels, how runs were made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from fastar.results.files import read_summary
from fastar.results.loading import load_runs
from fastar.results.plots import save_figure

ANALYSIS = Path(__file__).resolve().parents[3] / "analysis"
RESULTS, FIGURES, TABLES = ANALYSIS / "results", ANALYSIS / "figures", ANALYSIS / "tables"
PAPER = "#8C8C8C"
"""Grey: what the paper reports, of other models and other data."""


@dataclass(frozen=True)
class Picture:
    """A published figure; notebooks show it."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Page:
    """A published page of tables; notebooks show it."""

    path: Path

    def _repr_markdown_(self) -> str:
        return self.path.read_text(encoding="utf-8")


def panels(
    rows: int, columns: int, *, width: float = 3.3, height: float = 2.9
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` x `columns` panels of so many inches each; no pyplot, nothing global."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=8)
        panel.xaxis.label.set_fontsize(8.5)
        panel.yaxis.label.set_fontsize(8.5)
    return figure, axes.tolist()


def strips(rows: Mapping[str, NDArray[np.uint8]], columns: Sequence[str], *, width: float = 9.0) -> Figure:
    """A row of frames per label, [F, H, W, 3] each and all of one size, under the captions `columns`."""
    height, across = next(iter(rows.values())).shape[1:3]
    side = width / len(columns)
    size = (width + 1.2, len(rows) * side * height / across + 0.3)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=size, dpi=150, layout=layout)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    assert isinstance(axes, np.ndarray)
    for line, (label, frames) in zip(axes, rows.items(), strict=True):
        for panel, frame in zip(line, frames, strict=True):
            panel.imshow(frame, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for panel, caption in zip(axes[0], columns, strict=True):
        panel.set_title(caption, fontsize=8)
    return figure


def publish(figure: Figure, name: str) -> Picture:
    """Write `name`.png and `name`.pdf into `FIGURES`."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    with rc_context({"pdf.fonttype": 42}):  # TrueType: smaller, and text that can be edited
        figure.savefig(FIGURES / f"{name}.pdf", metadata={"CreationDate": None})  # the same bytes every time
    save_figure(figure, FIGURES / f"{name}.png")
    return Picture(FIGURES / f"{name}.png")


def publish_page(name: str, *parts: str) -> Page:
    """Write `name`.md into `TABLES`, paragraphs and tables as given, an empty line between them."""
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / f"{name}.md").write_text(
        "\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8"
    )
    return Page(TABLES / f"{name}.md")


def made_of(pattern: str | Path | Sequence[str | Path]) -> str:
    """What runs were made on, in one line: backbones, seeds, hardware, torch, code."""
    runs = load_runs(pattern)
    made = [(read_summary(Path(folder)) or {})["environment"] for folder in runs["folder"]]
    seeds = [seed if isinstance(seed, tuple) else (seed,) for seed in runs["seed"]]
    device = [each["cpu"] if each["device"] in (None, "cpu") else each["device"] for each in made]
    said = {
        "backbone": runs["backbone"],
        "seeds": [str(min(each)) if len(each) == 1 else f"{min(each)} to {max(each)}" for each in seeds],
        "hardware": device,
        "torch": [each["packages"]["torch"] for each in made],
        "code": [str(each["git"]["commit"])[:8] for each in made],
    }
    return "; ".join(f"{name} {', '.join(sorted(set(map(str, values))))}" for name, values in said.items())
