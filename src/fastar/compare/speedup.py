"""Speed-up of a free-running rollout over dense's, on the same clips, noise and kind of machine."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from fastar.results.files import SUMMARY, TABLE, read_summary
from fastar.results.run import Run

BASELINE = "dense"
CHUNK, STEADY = "chunk_s", "fps/steady"


@dataclass(frozen=True)
class Baseline:
    """What a finished run of `BASELINE` took: seconds by chunk, and its steady frames per second (None if unknown)."""

    seconds: dict[int, float]
    fps: float | None

    def chunk_rows(self, chunk: int, seconds: float) -> dict[str, float]:
        """Speed-up of a chunk that took `seconds` of wall time, as a metric of the chunk; nothing if unknown."""
        return {f"speedup/{BASELINE}": self.seconds[chunk] / seconds} if chunk in self.seconds else {}

    def steady_rows(self, fps: float) -> dict[str, float]:
        """Speed-up of a run with `fps` steady frames per second, as a metric of the run; nothing if unknown."""
        return {f"speedup/{BASELINE}/steady": fps / self.fps} if self.fps else {}


NONE = Baseline({}, None)


def baseline_of(run: Run) -> Baseline:
    """Dense's times for what `run` does, from a finished run beside it; `NONE` if there is no such run.

    Such a run has the same protocol, seeds, weights, device and settings, and differs in the method alone.
    """
    for path in sorted(run.folder.parent.glob(f"*/{SUMMARY}")):
        with suppress(ValueError):  # a damaged run is for the report to tell of
            found = read_summary(path.parent)
            if found is not None and found["status"] == "done" and _twins(found, run.summary):
                wanted = [("metric", "in", [CHUNK, STEADY])]
                rows = pq.read_table(path.parent / TABLE, partitioning=None, filters=wanted).to_pylist()
                seconds = {row["chunk"]: row["value"] for row in rows if row["metric"] == CHUNK}
                steady = [row["value"] for row in rows if row["metric"] == STEADY]
                return Baseline(seconds, steady[0] if steady else None)
    return NONE


def _twins(dense: dict[str, Any], other: dict[str, Any]) -> bool:
    if dense["labels"].get("method") != BASELINE or other["labels"].get("method") == BASELINE:
        return False

    def shared(summary: dict[str, Any]) -> list[Any]:
        config = {key: value for key, value in summary["config"].items() if key != "method"}
        device, protocol = summary["environment"]["device"], summary["labels"].get("protocol")
        return [config, device, protocol, summary["seed"], summary["checkpoint_sha256"]]

    return shared(dense) == shared(other)
