"""The end of a sweep: what came of its jobs, and one report on all of their runs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fastar.compare.caption import kinds
from fastar.compare.command import wide_console
from fastar.compare.report import hand_over, write_report
from fastar.sweep.status import STATES, Survey, count_rows, rerun_commands, survey


def finish_sweep(config: DictConfig, jobs: Sequence[str]) -> bool:
    """Show the state of these jobs and write the report; whether everything is done.

    Runs of several backbones or lengths, which no mean can join, get a report each.
    """
    console = wide_console()
    experiment = Path(config.paths.outputs) / config.name
    found = survey(experiment, jobs=jobs)
    readable = [run for run in found.runs if run.get("readable", True)]
    states = {experiment / run["run_id"]: run["state"] for run in readable}
    ended = [run for run, state in states.items() if state in ("done", "failed")]
    groups = [runs for runs in kinds(ended) if any(states[run] == "done" for run in runs)]
    for number, runs in enumerate(groups):
        report = write_report(
            experiment / ("report" if len(groups) == 1 else f"report_{number + 1}"),
            runs,
            methods=list(config.methods),
            seed=0 if isinstance(config.seeds, int) else config.seeds[0],
            baseline=config.baseline,
            budget_share=config.budget_share,
            remember=False,
        )
        report.show(console)
        name = hashlib.sha256("".join([report.folder.name, *jobs]).encode()).hexdigest()[:12]
        hand_over(report, config, name)
    show_status(found, console)
    return not found.unfinished


def show_sweep(config: DictConfig, jobs: Sequence[str]) -> bool:
    """Show the state of these jobs of rollouts, which have no report; whether everything is done."""
    found = survey(Path(config.paths.outputs) / config.name, jobs=jobs)
    show_status(found, wide_console())
    return not found.unfinished


def show_status(found: Survey, console: Console) -> None:
    """Runs by method and state, what failed and why, and the commands for the rest."""
    table = Table(title="runs", title_justify="left", header_style="bold")
    for name in ("protocol", "method", *STATES):
        table.add_column(name, justify="left" if name in ("protocol", "method") else "right")
    for row in count_rows(found.runs):
        table.add_row(*(str(value or "") for value in row.values()))
    if found.runs:
        console.print(table)
    for run in (run for run in found.runs if run["state"] == "failed"):
        console.print(f"failed: {run['method']}, protocol {run['protocol']}, seeds {run['seeds']}: {run['reason']}",
                      highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    for record, _ in found.jobs:
        if record.failure is not None:
            console.print(f"failed: {' '.join(record.overrides)}: {record.failure['reason']}",
                          highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    states = [state for _, state in found.jobs]
    told = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    console.print(f"{len(states)} jobs: {told}; {len(found.runs)} runs known, {found.counts()['done']} done")
    if found.unfinished:
        console.print("to do what is not done (what is done is skipped):")
        for command in rerun_commands(found.unfinished):
            console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
