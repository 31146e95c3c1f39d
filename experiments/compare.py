"""Methods x seeds x protocols on one backbone: a table with spread, plots and a side-by-side video.

    python experiments/compare.py 'method=[dense,tempcache,window]' seeds=5
    python experiments/compare.py experiment=demo

The methods are the files of conf/method; conf/compare.yaml explains the settings. Every (method, seed, protocol) is a
run below outputs/<name>/. Given again, the command skips what is finished and goes on where it was interrupted.
"""

import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.compare.command import check_choices, check_writable, clear_errors, progress_bar, wide_console
from fastar.compare.comparison import Comparison
from fastar.compare.report import write_report
from fastar.compare.session import open_session

METHODS = Path(__file__).resolve().parent.parent / "conf/method"


@hydra.main(version_base=None, config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Run, then report."""
    with clear_errors():
        compare(config)


def compare(config: DictConfig) -> None:
    """All runs of `config`, and the report on them."""
    console = wide_console()
    folder = Path(config.paths.outputs) / config.name
    check_writable(folder)
    comparison = Comparison(config, open_session(config))
    with progress_bar(console) as progress:
        task = progress.add_task("chunks", total=comparison.total_chunks)
        comparison.advance = lambda chunks: progress.advance(task, chunks)
        comparison.say = lambda line: progress.console.print(line, highlight=False, markup=False)
        comparison.run()
        progress.update(task, completed=comparison.total_chunks)
    identifier = comparison.report_id
    report = write_report(
        folder / f"report_{identifier}",
        comparison.runs,
        methods=list(comparison.methods),
        seed=comparison.seeds[0],
        baseline=config.baseline,
        budget_share=config.budget_share,
    )
    OmegaConf.save(config, report.folder / "config.yaml")
    report.show(console)
    plain = OmegaConf.to_container(config, resolve=True)
    labels = {"method": "comparison"}
    summary = {"run_id": identifier, "experiment": config.name, "labels": labels, "config": plain}
    report.mirror(instantiate(config.logger), summary)


if __name__ == "__main__":
    check_choices(sys.argv[1:], METHODS)
    main()
