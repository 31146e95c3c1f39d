"""Is a trained backbone worth comparing methods on? The numbers of its model card, on held-out clips.

    python experiments/evaluate.py checkpoint=checkpoints/doom
    python experiments/evaluate.py backbone=scenes data=scenes

One JSON line per measure is written to `output`/backbone.jsonl, all of them as a table to backbone.md; see
conf/evaluate.yaml for sizes.
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run the measures named in `measures`."""
    with clear_errors():
        from fastar.compare.evaluation import run

        run(config)


if __name__ == "__main__":
    main()
