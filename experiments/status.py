"""What of a sweep is done, running, waiting, failed or missing; and the command that does what is not done.

    python experiments/status.py runs=outputs/frontier
    python experiments/status.py runs=outputs/frontier sweep=sweep.txt sweep_file=todo.txt   # a sweep file

Runs and jobs whose process was killed are noted as failed, with their last log lines; the next command resumes them.
"""

import shlex
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="status")
def main(config: DictConfig) -> None:
    """Show the state."""
    with clear_errors():
        status(config)


def status(config: DictConfig) -> None:
    """Show the state; write unfinished jobs to `sweep_file`, the overrides of one on each line."""
    from fastar.compare.command import wide_console
    from fastar.compare.sweep_report import show_status
    from fastar.sweep.records import read_sweep_file
    from fastar.sweep.status import place_of, survey

    folder = Path(config.runs)
    asked = [] if config.sweep is None else read_sweep_file(Path(config.sweep), folder)
    found = survey(folder, asked=asked)
    show_status(found, wide_console())
    if config.sweep_file is not None:
        lines = [shlex.join([*record.overrides, *place_of(record)]) for record in found.unfinished]
        Path(config.sweep_file).write_text("".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} jobs written to {config.sweep_file}")


if __name__ == "__main__":
    main()
