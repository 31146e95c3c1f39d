"""Push the W&B report on an ablation: its runs' curves and bars, grouped by method.

    python experiments/wandb_report.py outputs/frontier my-team/fastar

Needs `pip install -e '.[wandb-report]'`, `wandb login`, and the runs there (logger=wandb logger.mode=online, or
`wandb sync` of what was logged offline). What the report shows is described in src/fastar/results/wandb_report.py.
"""

import argparse

from fastar.compare.command import clear_errors


def main() -> None:
    """Build, then push."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", help="folder or glob of the runs of one experiment")
    parser.add_argument("target", help="ENTITY/PROJECT at W&B")
    parser.add_argument(
        "--group", help="if the runs were logged with logger.group=...; default: the experiment"
    )
    parser.add_argument("--draft", action="store_true", help="save as a draft that only you see")
    arguments = parser.parse_args()
    with clear_errors():
        from fastar.results.wandb_report import push, report_on

        report = report_on(arguments.runs, target=arguments.target, group=arguments.group)
        print(push(report, draft=arguments.draft))


if __name__ == "__main__":
    main()
