"""Runs that are there already, told to a sink as if they were made now: W&B of what was measured elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fastar.results.loading import FAILURE, find_runs, rows_of
from fastar.results.rows import to_pandas
from fastar.results.sinks import Sink
from fastar.results.stills import STILLS, TRUTH

PATIENCE = 3600.0
"""Seconds that the end of the process may wait for a sink when telling it is all that the process does."""


def replay(pattern: str | Path | Sequence[str | Path], sink: Sink, target: Path) -> int:
    """Tell `sink` every finished or failed run that `pattern` names, with its pictures and videos; returns how many.

    Args:
        pattern: as of `fastar.results.load`.
        target: the sink's files go to `target`/<experiment>/<run id>: recorded runs stay as they are.

    Raises:
        ValueError: no runs are there, or one is damaged.
    """
    told = 0
    for folder, summary in find_runs(pattern):
        if summary["status"] in ("done", "failed"):
            place = target / str(summary["experiment"]) / summary["run_id"]
            place.mkdir(parents=True, exist_ok=True)
            _tell(sink, folder, summary, place)
            told += 1
    return told


def _tell(sink: Sink, folder: Path, summary: dict[str, Any], place: Path) -> None:
    rows = to_pandas(rows_of(folder, summary, partial=False))
    sink.start(place, summary | {"starts": 1})
    # chunk by chunk, as a run logs them; what is of the whole run last
    keys = ["chunk", "frame", "clip"]
    rows = rows[rows["metric"] != FAILURE].sort_values(keys, kind="stable")
    for (chunk, frame, clip), group in rows.groupby(keys, sort=False, dropna=False):
        values = dict(zip(group["metric"], group["value"], strict=True))
        sink.scalars(values, chunk=_whole(chunk), frame=_whole(frame), clip=_whole(clip))
    for picture in (folder / STILLS, folder / TRUTH):
        if picture.exists():
            sink.image(picture.stem, picture)
    for video in sorted((folder / "videos").glob("*.mp4")):
        sink.video(video.stem, video)
    sink.finish(summary["status"])


def _whole(number: Any) -> int | None:
    return None if pd.isna(number) else int(number)
