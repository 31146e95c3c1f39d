"""Tables and plots of runs that were made earlier, here or elsewhere; conf/report.yaml explains the settings.

python experiments/report.py runs=outputs/frontier
python experiments/report.py runs=outputs/frontier record=analysis/results/frontier
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from fastar.compare.command import check_writable, clear_errors, wide_console
from fastar.compare.report import write_report
from fastar.results.loading import find_runs
from fastar.results.record import record_runs


@hydra.main(version_base=None, config_path="../conf", config_name="report")
def main(config: DictConfig) -> None:
    """Record, then report."""
    with clear_errors():
        report(config)


def report(config: DictConfig) -> None:
    """The report on the runs of `config`, on the copies if they are recorded."""
    pattern = list(config.runs) if OmegaConf.is_list(config.runs) else str(config.runs)
    if config.record is not None:
        check_writable(Path(config.record))
        runs = record_runs(pattern, Path(config.record))
    else:
        runs = [run for run, _ in find_runs(pattern)]
    folder = Path(config.output) if config.output is not None else runs[0].parent / "report"
    check_writable(folder)
    present = {summary["labels"]["method"] for _, summary in find_runs(runs)}
    order = [*(name for name in config.method if name in present), *sorted(present - set(config.method))]
    write_report(
        folder,
        runs,
        methods=order,
        seed=config.seed,
        baseline=config.baseline,
        budget_share=config.budget_share,
        remember=False,
    ).show(wide_console())


if __name__ == "__main__":
    main()
