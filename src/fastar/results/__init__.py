"""Run identity, provenance, the tidy store, tables, and sinks that mirror runs elsewhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastar.results.identity import SCHEMA_VERSION, recorded_config, run_id
    from fastar.results.loading import load, load_runs
    from fastar.results.run import Run
    from fastar.results.store import RunStore

__all__ = ["SCHEMA_VERSION", "Run", "RunStore", "load", "load_runs", "recorded_config", "run_id"]

# Imported on first use: an entry point that only answers --help shall not wait for torch and pandas.
_MODULES = {
    "SCHEMA_VERSION": "identity",
    "recorded_config": "identity",
    "run_id": "identity",
    "load": "loading",
    "load_runs": "loading",
    "Run": "run",
    "RunStore": "store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
