"""What a run, and an experiment as a whole, tells the outside."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Sink:
    """A mirror of runs, one after another; this one mirrors nothing. No call of it may stop a run, or hold it up.

    Attributes:
        problem: why the sink stopped working in the current run, None while it works.
    """

    @property
    def problem(self) -> str | None:
        return None

    def start(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """A run begins in `folder`; `summary` is its summary.json."""

    def scalars(
        self,
        values: Mapping[str, float],
        *,
        chunk: int | None = None,
        frame: int | None = None,
        clip: int | None = None,
    ) -> None:
        """Numbers of one chunk, or of the whole run if `chunk` is None."""

    def table(self, name: str, table: "pd.DataFrame") -> None:
        """A finished table."""

    def image(self, name: str, path: Path) -> None:
        """A picture file."""

    def video(self, name: str, path: Path) -> None:
        """An MP4 file."""

    def finish(self, status: str) -> None:
        """The run ends as done, failed or interrupted."""


class NullSink(Sink):
    """Mirrors nothing: what conf/logger/none.yaml names."""
