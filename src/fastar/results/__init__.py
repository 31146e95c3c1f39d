"""Run identity, provenance, the tidy store, tables, and sinks that mirror runs elsewhere."""

from fastar.results.identity import SCHEMA_VERSION, recorded_config, run_id
from fastar.results.load import load, load_runs
from fastar.results.store import Run, RunStore

__all__ = ["SCHEMA_VERSION", "Run", "RunStore", "load", "load_runs", "recorded_config", "run_id"]
