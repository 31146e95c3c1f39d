"""What experiments/benchmark.py does: one mode of measuring, its card, its tables, one line of JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from fastar.benchmark.dense import run_dense
from fastar.benchmark.endurance import run_endurance
from fastar.benchmark.engines import run_engines
from fastar.benchmark.loops import run_loops
from fastar.benchmark.modules import run_modules
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.record import run_record
from fastar.benchmark.rollout import run_rollout
from fastar.benchmark.search import run_search
from fastar.cache.base import check_choice

Mode = Callable[[DictConfig, Page], tuple[Rows, dict[str, Rows]]]
MODES: dict[str, Mode] = {
    "engines": run_engines,
    "record": run_record,
    "rollout": run_rollout,
    "dense": run_dense,
    "modules": run_modules,
    "endurance": run_endurance,
    "loops": run_loops,
    "search": run_search,
}


def run(config: DictConfig) -> dict[str, Any]:
    """Measure, show, and write `<mode>.json` (and parquet files of curves) to `output`.

    Raises:
        ValueError: an unknown mode, dtype, device, engine or method, or a folder that cannot be written.
    """
    check_choice("mode", config.mode, tuple(MODES))
    page = Page(config)
    return page.finish(*MODES[config.mode](config, page))
