"""Hydra's hooks around a sweep: its jobs are written down before the first begins; at the end there is one report."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fastar.compare.command import check_writable, clear_errors
from fastar.results.launch import launch_id
from fastar.sweep.records import job_key, record_of
from fastar.sweep.status import is_held


@contextmanager
def errors_end_the_command() -> Iterator[None]:
    """Hydra turns what a callback raises into a warning, and the command would end with status 0."""
    try:
        with clear_errors():
            yield
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


class SweepCallback(Callback):
    """Named in conf/compare.yaml and conf/rollout.yaml under hydra.callbacks."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write a record for every job, so that what was never begun is known to be missing."""
        launch_id()  # in the environment before any job is started
        experiment = Path(config.paths.outputs) / config.name
        with errors_end_the_command():
            check_writable(experiment)
            for overrides in expand(config):
                record = record_of(experiment, program_of(config), overrides)
                # if it is held, another sweep is at it, and shares the runs with this one
                if not is_held(record.folder):
                    record.status, record.failure = "waiting", None
                    record.save()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show what came of the jobs, and one report on all of their runs; exit status 1 if something is missing."""
        with errors_end_the_command():
            from fastar.compare.sweep_report import finish_sweep, show_sweep

            jobs = [job_key(overrides) for overrides in expand(config)]
            complete = finish_sweep(config, jobs) if "baseline" in config else show_sweep(config, jobs)
            if not complete:
                sys.exit(1)


def program_of(config: DictConfig) -> str:
    """File name of the entry point."""
    return f"{config.hydra.job.name}.py"


def expand(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a multirun by Hydra's basic sweeper; none for others, which decide as they go.

    Swept values come from the command line and from `hydra.sweeper.params`, as in Hydra itself.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
        return []
    given: Any = config.hydra.sweeper.get("params") or {}
    lines = [f"{name}={values}" for name, values in given.items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(lines)
    [jobs] = BasicSweeper.split_arguments(overrides, None)
    return [list(job) for job in jobs]
