"""What a merge threshold costs and saves in every layer: measured once, for thresholds by error target.

    python experiments/calibrate_thresholds.py checkpoint=checkpoints/doom

Writes threshold_errors.json beside the weights (see fastar.cache.ThresholdErrors); conf/calibrate_thresholds.yaml
explains the settings.
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="calibrate_thresholds")
def main(config: DictConfig) -> None:
    """Measure and write."""
    with clear_errors():
        from fastar.compare.threshold_calibration import calibrate_thresholds

        calibrate_thresholds(config)


if __name__ == "__main__":
    main()
