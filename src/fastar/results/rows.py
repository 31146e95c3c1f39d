"""One row per chunk and metric: the columns, their types, and how rows become a table."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("chunk", pa.int64()),
        ("frame", pa.int64()),
        ("clip", pa.int64()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("time", pa.float64()),
    ]
)
"""metric: name, see `fastar.metrics.names`. chunk: index from 0, or null for a value of the whole run. frame: index of
the chunk's first pixel frame in the rollout, from 0. clip: index in the batch, or null if the value is of all clips.
value: float64, in `unit` ("" for a pure number). time: Unix seconds at which the row was logged."""


def deduplicated(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the last value of each (metric, chunk, frame, clip): a resumed run logs some chunks again."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        latest[(row["metric"], row["chunk"], row["frame"], row["clip"])] = row
    return list(latest.values())


def to_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Deduplicated rows as an Arrow table of `SCHEMA`."""
    return pa.Table.from_pylist(deduplicated(rows), schema=SCHEMA)


def write_table(table: pa.Table, path: Path) -> None:
    """A Parquet file, as small as it gets: thousands of them are kept."""
    pq.write_table(table, path, compression="zstd", compression_level=19)


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A table of `SCHEMA` with nullable integers for chunk, frame and clip."""
    frame: pd.DataFrame = table.to_pandas()
    return frame.astype({"chunk": "Int64", "frame": "Int64", "clip": "Int64"})
