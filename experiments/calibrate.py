"""Which heads of a trained backbone need the past: measured once, dense, for the caches that split a budget over heads.

    python experiments/calibrate.py checkpoint=checkpoints/doom

Writes head_errors.json beside the weights (see fastar.cache.HeadErrors); conf/calibrate.yaml explains the settings.
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="calibrate")
def main(config: DictConfig) -> None:
    """Measure and write."""
    with clear_errors():
        from fastar.compare.calibration import calibrate

        calibrate(config)


if __name__ == "__main__":
    main()
