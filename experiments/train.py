"""Train a backbone on data that is made as it goes: the autoencoder, then the causal transformer in its latents.

    python experiments/train.py backbone=doom

See conf/train.yaml for the options; the result is a checkpoint folder that `checkpoint=...` loads. SIGTERM, SIGUSR1 or
SIGUSR2 make it save and stop, and go back to the queue if it is a Slurm job; the same command goes on.
"""

import logging

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors
from fastar.interruption import Interrupted, listening, requeue

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train, or go on training."""
    with clear_errors(), listening():
        try:
            from fastar.training.stages import train

            train(config)
        except Interrupted as interrupted:
            log.info("%s", interrupted)
            log.info("%s", requeue())
            raise


if __name__ == "__main__":
    main()
