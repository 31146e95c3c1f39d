"""A report on runs that are there already, and their way to W&B; what experiments/report.py does."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.compare.command import check_writable, wide_console
from fastar.compare.report import write_report
from fastar.results.loading import find_runs
from fastar.results.record import record_runs
from fastar.results.replay import PATIENCE, replay
from fastar.results.sinks import NullSink


def report(config: DictConfig) -> None:
    """The report on the runs of `config`, on the copies if they are recorded; all of it told to the logger."""
    pattern = list(config.runs) if OmegaConf.is_list(config.runs) else str(config.runs)
    if config.record:
        check_writable(Path(config.record))
        leaner = {name: config[name] for name in ("timings", "curves", "together", "stills", "still_height")}
        runs = record_runs(pattern, Path(config.record), **leaner)
    else:
        runs = [run for run, _ in find_runs(pattern)]
    folder = Path(config.output) if config.output else runs[0].parent / "report"
    check_writable(folder)
    present = {summary["labels"]["method"] for _, summary in find_runs(runs)}
    order = [*(name for name in config.order if name in present), *sorted(present - set(config.order))]
    found = write_report(
        folder,
        runs,
        methods=order,
        seed=config.seed,
        baseline=config.baseline,
        budget_share=config.budget_share,
        remember=False,
    )
    found.show(wide_console())
    if "flush_seconds" in config.logger:
        config.logger.flush_seconds = max(PATIENCE, config.logger.flush_seconds)
    sink = instantiate(config.logger)
    if not isinstance(sink, NullSink):
        mirrored = Path(config.paths.outputs) / "mirrored"
        replay(pattern, sink, mirrored)
        [experiment, *_] = sorted({str(summary["experiment"]) for _, summary in find_runs(runs)})
        labels = {"method": "comparison"}
        told = {"run_id": f"{experiment}-report", "experiment": experiment, "labels": labels}
        place = mirrored / experiment / "report"
        place.mkdir(exist_ok=True)
        found.mirror(sink, told | {"config": OmegaConf.to_container(config, resolve=True)}, place)
