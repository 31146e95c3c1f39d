"""Work that takes time and no more: counts to `chunks` in a file, and stops and goes on as experiments do."""

import logging
import os
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fastar.interruption import Interrupted, check, listening, requeue

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path=".", config_name="count")
def main(config: DictConfig) -> None:
    """A line `number start pid` for each chunk, where start counts how often Slurm has started the job again."""
    done = Path(config.paths.outputs) / config.name / f"{config.job}.txt"
    first = len(done.read_text().splitlines()) if done.exists() else 0
    with listening():
        try:
            for number in range(first, config.chunks):
                time.sleep(config.chunk_s)
                with done.open("a") as file:
                    file.write(f"{number} {os.environ.get('SLURM_RESTART_COUNT', 0)} {os.getpid()}\n")
                check()
        except Interrupted as interrupted:
            log.warning("%s", interrupted)
            log.warning("%s", requeue())
            raise


if __name__ == "__main__":
    main()
