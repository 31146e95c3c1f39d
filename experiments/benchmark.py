"""How fast attention runs on this machine, engine by engine: a card with the ceiling, a table, one line of JSON.

    python experiments/benchmark.py

conf/benchmark.yaml explains the settings.
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Measure and write."""
    with clear_errors():
        from fastar.benchmark.command import run

        run(config)


if __name__ == "__main__":
    main()
