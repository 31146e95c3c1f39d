"""Speed of whole rollouts as it is recorded: what `experiments/benchmark.py mode=rollout` wrote on a GPU."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from fastar.results.figures import RESULTS

RECORD = RESULTS / "speed" / "rollout.json"
COLUMNS = (
    "method", "cache (GiB)", "frames/s, denoise", "+ commit", "ms a frame", "over stock", "over dense", "peak (GiB)",
    "note",
)  # fmt: skip


def read_speed(path: Path | None = None) -> tuple[pd.DataFrame, str]:
    """The methods of a record, a line each with the columns `COLUMNS` as text, and what it was made on.

    Rates are of video frames in the steady state; the ratio to stock has the least and greatest of its repeats, where
    they differ. A method that failed has its reason in `note`.

    Args:
        path: `RECORD` by default.

    Raises:
        ValueError: there is no such record, or it is none of a rollout.
    """
    rows, made_on = rollout_rows(path)
    lines = [_line(row) for row in rows if "method" in row and "latent_frames" not in row]
    return pd.DataFrame(lines, columns=list(COLUMNS)).fillna("–"), made_on


def rollout_rows(path: Path | None = None) -> tuple[list[dict[str, Any]], str]:
    """Rows of a record as `mode=rollout` wrote them, and what it was made on; argument and errors of `read_speed`."""
    path = RECORD if path is None else path
    if not path.exists():
        raise ValueError(
            f"no speed is recorded in {path}: run `python experiments/benchmark.py mode=rollout` on a GPU and copy "
            f"outputs/benchmark/rollout.json there"
        )
    record = json.loads(path.read_text())
    if record.get("card", {}).get("mode") != "rollout":
        raise ValueError(f"{path} is no record of a rollout: give the rollout.json of mode=rollout")
    return record["rows"], _made_on(record["card"])


def _line(row: dict[str, Any]) -> dict[str, str]:
    named = {"method": row["method"] + ("" if row.get("budget") is None else f", {row['budget']:g} frames")}
    if row.get("reason"):
        return named | {"note": row["reason"]}
    if "over_video_frames" in row:  # of the unbounded cache, over a whole rollout
        return named | {
            "+ commit": f"{row['fps']:.2f}",
            "ms a frame": f"{1000 / row['fps']:.1f}",
            "note": f"mean over {row['over_video_frames']:,} frames; {row['note']}",
        }
    low, high = row.get("ratio_low", row["ratio"]), row.get("ratio_high", row["ratio"])
    ratio = f"{row['ratio']:.2f}"
    if row["method"] != "stock" and f"{low:.2f}" != f"{high:.2f}":
        ratio += f" [{low:.2f}, {high:.2f}]"
    return named | {
        "cache (GiB)": f"{row['cache_bytes'] / 2**30:.2f}",
        "frames/s, denoise": f"{row['fps_denoise']:.1f}",
        "+ commit": f"{row['fps_commit']:.1f}",
        "over stock": ratio,
        "over dense": f"{row['over_dense']:.2f}" if row.get("over_dense") is not None else "–",
        "ms a frame": f"{1000 / row['fps_commit']:.1f}",
        "peak (GiB)": f"{row['peak_allocated'] / 2**30:.1f}" if "peak_allocated" in row else "–",
        "note": "" if row.get("full", 1) else "cache not full yet",
    }


def _made_on(card: dict[str, Any]) -> str:
    return (
        f"backbone {card['backbone']} of {card['layers']} layers, {card['weights']} weights, {card['dtype']}; "
        f"hardware {card['device']}; torch {card['torch']}; code {card['code']}; {card['day']}"
    )
