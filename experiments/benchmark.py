"""How fast things run on this machine: a card with the ceiling, tables, one line of JSON.

    python experiments/benchmark.py                      # attention engines
    python experiments/benchmark.py mode=record          # real motion, which the modes below read
    python experiments/benchmark.py mode=rollout         # methods at their budgets, beside the stock window
    python experiments/benchmark.py mode=loops method=all           # every method on every sampling loop

conf/benchmark.yaml explains the settings and the other modes.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fastar.compare.command import check_choices, clear_errors, with_all

METHODS = Path(__file__).resolve().parent.parent / "conf/method"


@hydra.main(version_base=None, config_path="../conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Measure and write."""
    with clear_errors():
        from fastar.benchmark.command import run

        run(config)


if __name__ == "__main__":
    sys.argv[1:] = with_all(sys.argv[1:], METHODS)
    check_choices(sys.argv[1:], METHODS)
    main()
