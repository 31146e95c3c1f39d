"""Mirrors of a run in other places. The store is the truth; a sink that breaks or is slow never stops a run.

    base       what a sink is; NullSink
    csv_files  CsvSink
    wandb_sink WandbSink, what a run talks to: it only appends to a queue
    worker     the one thread of the process that empties the queue, and the bounded wait at the process's end
    mirror     one run as W&B sees it; lives in that thread
    uploader   mode=online: a child process sends the files of offline runs while they are written

Importing this loads neither wandb nor pandas.
"""

from fastar.results.sinks.base import NullSink, Sink
from fastar.results.sinks.csv_files import CsvSink
from fastar.results.sinks.wandb_sink import WandbSink

__all__ = ["CsvSink", "NullSink", "Sink", "WandbSink"]
