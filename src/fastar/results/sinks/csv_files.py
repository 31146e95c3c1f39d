"""Comma-separated files in a run's folder."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastar.results.sinks.base import Sink

if TYPE_CHECKING:
    import pandas as pd


class CsvSink(Sink):
    """Files in the run's folder: `scalars.csv` (metric, chunk, frame, clip, value) and one per table."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._file: TextIO | None = None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self._folder = folder
        path = folder / "scalars.csv"
        new = not path.exists()  # a resumed run goes on in its file
        self._file = path.open("a", newline="", buffering=1)
        if new:
            csv.writer(self._file).writerow(["metric", "chunk", "frame", "clip", "value"])

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        if self._file is not None:
            csv.writer(self._file).writerows(
                [name, chunk, frame, clip, value] for name, value in values.items()
            )

    def table(self, name: str, table: "pd.DataFrame") -> None:
        if self._folder is not None:
            table.to_csv(self._folder / f"{name}.csv", index=False)

    def finish(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
