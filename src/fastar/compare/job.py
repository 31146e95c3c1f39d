"""One comparison, as a command of its own or as a job of a sweep."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.comparison import Comparison
from fastar.compare.report import hand_over, write_report
from fastar.compare.session import open_session
from fastar.results.files import read_summary
from fastar.sweep.records import JobRecord


def compare(config: DictConfig, record: JobRecord | None = None, *, report: bool = True) -> bool:
    """All runs of `config`, and the report on them unless a sweep makes one of all its jobs; whether all are done."""
    console = wide_console()
    folder = Path(config.paths.outputs) / config.name
    check_writable(folder)
    comparison = Comparison(config, open_session(config))
    if record is not None:
        record.plan(comparison.planned())
    with progress_bar(console) as progress:
        task = progress.add_task("chunks", total=comparison.total_chunks)
        comparison.advance = lambda chunks: progress.advance(task, chunks)
        comparison.say = lambda line: progress.console.print(line, highlight=False, markup=False)
        comparison.run()
        progress.update(task, completed=comparison.total_chunks)
    if report:
        report_on(comparison)
    return all((read_summary(run) or {}).get("status") == "done" for run in comparison.runs)


def report_on(comparison: Comparison) -> None:
    """Tables, plots and videos of this comparison, shown and handed to the logger."""
    config, identifier = comparison.config, comparison.report_id
    folder = Path(config.paths.outputs) / config.name / f"report_{identifier}"
    found = write_report(
        folder,
        comparison.runs,
        methods=list(comparison.methods),
        seed=comparison.seeds[0],
        baseline=config.baseline,
        budget_share=config.budget_share,
    )
    OmegaConf.save(config, found.folder / "config.yaml")
    found.show(wide_console())
    hand_over(found, config, identifier)
