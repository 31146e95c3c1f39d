"""VBench's scores of videos that are there already, in VBench's own environment; conf/vbench.yaml explains.

python experiments/vbench.py videos=outputs/compare python=vbench-env/bin/python download=true
python experiments/vbench.py videos=longvgenbench prompts=longvgenbench/prompts.csv lite=true
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="vbench")
def main(config: DictConfig) -> None:
    """Score and store."""
    with clear_errors():
        from fastar.compare.vbench import evaluate

        evaluate(config)


if __name__ == "__main__":
    main()
