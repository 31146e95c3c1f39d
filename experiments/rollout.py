r"""One method, one rollout: a video beside what the simulator shows for the same actions, and its speed and memory.

    python experiments/rollout.py method=tempcache 'actions="forward*20,left*12"' seed=3
    python experiments/rollout.py backbone=scenes data=scenes prompts=experiments/prompts/example.yaml

    python experiments/rollout.py backbone=wan_1_3b rollout=self_forcing data=vbench prompts=all_dimension.txt \
        checkpoint=self_forcing_dmd.pt autoencoder=wan dtype=bfloat16 videos_per_prompt=5

The second makes a video from prompts alone, which may change on the way, and puts it beside what they say; the third
videos of every prompt of a file, named as VBench wants them.

conf/rollout.yaml explains the settings. The run is kept below outputs/rollout/; interrupted, the same command goes on.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fastar.compare.command import check_choices
from fastar.sweep.job import run_job
from fastar.sweep.records import JobRecord

METHODS = Path(__file__).resolve().parent.parent / "conf/method"


@hydra.main(version_base=None, config_path="../conf", config_name="rollout")
def main(config: DictConfig) -> None:
    """Generate, or find what an earlier command generated."""
    run_job(config, Path(__file__).name, work)


def work(config: DictConfig, record: JobRecord | None) -> None:
    """One rollout, or one of every prompt of a file."""
    if "prompts" in config.data:
        from fastar.compare.prompt_videos import roll_prompts

        roll_prompts(config, record)
    else:
        from fastar.compare.single import roll

        roll(config, record)


if __name__ == "__main__":
    check_choices(sys.argv[1:], METHODS)
    main()
