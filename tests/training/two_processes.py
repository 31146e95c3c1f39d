"""What each of two processes runs, as torchrun would start them: a training, the same one stopped twice, and resumed.

python -m tests.training.two_processes FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from fastar.interruption import Interrupted, listening
from fastar.training import stages
from tests.training.small import moving_bars

CONF = str(Path(__file__).resolve().parents[2] / "conf")


def train(output: Path, *more: str) -> str:
    """How it ended."""
    with initialize_config_dir(config_dir=CONF, version_base=None):
        config = compose("train", overrides=moving_bars(output, "training.transformer.max_steps=14", *more))
    try:
        with listening():
            stages.train(config)
    except Interrupted as interrupted:
        return interrupted.received.name
    except SystemExit as end:
        return f"exit {end.code}"
    except ValueError as error:
        return str(error)
    return "done"


def main(folder: Path) -> None:
    """Trainings one after the other; prints how they ended."""
    ends = [train(folder / "whole"), train(folder / "held")]
    # signals that reach the second process only, in the autoencoder's sixth step and the transformer's twelfth
    for signals in ("{11:SIGUSR1}", "{46:SIGTERM}", "{}"):
        ends.append(train(folder / "stopped", f"+data.train.signals={signals}", "+data.train.only_rank=1"))
    for end in ends:
        print("end:", end, flush=True)  # noqa: T201 - read by the test


if __name__ == "__main__":
    main(Path(sys.argv[1]))
