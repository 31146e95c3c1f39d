"""A picture of which phrases of a prompt a method reads, frame by frame, and which ones matter.

It is drawn from prompt.json of a run's folder: of its first clip, chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fastar.compare.clips import Clips
from fastar.data.video import read_mp4
from fastar.results.files import PROMPT, read_summary, unwritable, write_json
from fastar.results.plots import save_figure


def keep(folder: Path, clips: Clips, first: int, frames: int, share: Tensor | None) -> None:
    """Write what the chunk at frame `first` read of the first clip's prompt: `share` [B, S], or None for all of it."""
    if clips.phrases is None or clips.relevance is None:
        return
    relevant = clips.relevance[0, first : first + frames].any(0)
    phrases = [
        {
            "shot": phrase.shot,
            "text": phrase.text,
            "read": 1.0 if share is None else float(share[0, list(phrase.tokens)].mean()),
            "matters": bool(relevant[list(phrase.tokens)].any()),
        }
        for phrase in clips.phrases[0]
    ]
    chunks = {chunk["frame"]: chunk for chunk in read(folder)}
    chunks[first] = {"frame": first, "frames": frames, "phrases": phrases}
    try:
        write_json(folder / PROMPT, {"chunks": [chunks[frame] for frame in sorted(chunks)]})
    except OSError as error:
        raise unwritable(folder, error) from error


def draw_all(folder: Path, runs: Sequence[Path], names: Mapping[str, str]) -> dict[str, Path]:
    """A picture `words_<method>.png` of every run that kept its words; `names` are methods by run id."""
    video = next(
        (read_mp4(path) for run in runs for path in sorted(run.glob("videos/generated_*.mp4"))), None
    )
    found = {}
    for run in runs:
        summary = read_summary(run)
        chunks = read(run)
        if (
            summary is None
            or not chunks
            or all(phrase["read"] == 1 for chunk in chunks for phrase in chunk["phrases"])
        ):
            continue  # dense: nothing to see
        name = f"words_{names[summary['run_id']]}"
        found[name] = draw(chunks, folder / f"{name}.png", title=names[summary["run_id"]], video=video)
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """The chunks that were kept of a run, in order; none if it kept no words."""
    path = folder / PROMPT
    found: list[dict[str, Any]] = json.loads(path.read_text())["chunks"] if path.exists() else []
    return found


def draw(chunks: Sequence[Mapping[str, Any]], path: Path, *, title: str, video: Tensor | None) -> Path:
    """Phrases against frames: how dark a field is says how much was read, a frame around it that it matters.

    Args:
        chunks: as `read` gives them.
        path: of the PNG.
        title: of the method.
        video: uint8 [F, H, W, 3] of the frames from the first chunk on, shown above; or None.
    """
    phrases = chunks[0]["phrases"]
    read = np.array([[phrase["read"] for phrase in chunk["phrases"]] for chunk in chunks]).T
    edges = [chunk["frame"] for chunk in chunks] + [chunks[-1]["frame"] + chunks[-1]["frames"]]
    tall = 0.21 * len(phrases)
    figure = Figure(figsize=(11, 1.3 + tall), layout="constrained")
    rows = figure.subplots(2, 1, height_ratios=[0.42, tall], sharex=True)
    axes = rows[1]
    image = axes.pcolormesh(edges, np.arange(len(phrases) + 1), read, cmap="Blues", vmin=0, vmax=1)
    for column, chunk in enumerate(chunks):
        for row, phrase in enumerate(chunk["phrases"]):
            if phrase["matters"]:
                box = [edges[column], edges[column + 1]]
                axes.fill_between(
                    box, row + 0.06, row + 0.94, facecolor="none", edgecolor="#D55E00", linewidth=1
                )
    cuts = [i for i in range(1, len(phrases)) if phrases[i]["shot"] != phrases[i - 1]["shot"]]
    axes.hlines(cuts, edges[0], edges[-1], color="#8C8C8C", linewidth=0.8)
    axes.set_yticks(np.arange(len(phrases)) + 0.5, [phrase["text"] for phrase in phrases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("frame")
    figure.colorbar(image, ax=axes, label="share of the phrase that is read", pad=0.01)
    _show_frames(rows[0], video, edges)
    rows[0].set_title(
        f"{title}: what it reads of the prompt; in orange frames, what the video shows", fontsize=10
    )
    save_figure(figure, path, dpi=110)
    return path


def _show_frames(axes: Any, video: Tensor | None, edges: Sequence[int]) -> None:
    """Frames of the video side by side, each above its place on the axis of frames."""
    axes.axis("off")
    if video is None:
        return
    first, last, shown = edges[0], edges[-1], 12
    width = (last - first) / shown
    for number in range(shown):
        frame = min(int((number + 0.5) * width), len(video) - 1)
        left = first + number * width
        axes.imshow(video[frame].numpy(), extent=(left, left + 0.96 * width, 0, 1), aspect="auto")
    axes.set_xlim(first, last)
    axes.set_ylim(0, 1)
