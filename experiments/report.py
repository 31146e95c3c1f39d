"""Tables and plots of runs that were made earlier, here or elsewhere; conf/report.yaml explains the settings.

python experiments/report.py runs=outputs/frontier
python experiments/report.py runs=outputs/frontier record=analysis/results/frontier
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="report")
def main(config: DictConfig) -> None:
    """Record, then report."""
    with clear_errors():
        from fastar.compare.recorded import report

        report(config)


if __name__ == "__main__":
    main()
