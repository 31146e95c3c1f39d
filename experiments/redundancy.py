"""Is the redundancy there that a compressed cache lives on? Keys, values, queries and attention of held-out clips.

    python experiments/redundancy.py
    python experiments/redundancy.py backbone=scenes data=scenes
    python experiments/redundancy.py checkpoint=random        # the control: what looks redundant without training

One run of the store for each method; conf/redundancy.yaml explains the settings. analysis/figure_2_recall_density.py
and figure_3_pca.py draw the results.
"""

import hydra
from omegaconf import DictConfig

from fastar.compare.command import clear_errors


@hydra.main(version_base=None, config_path="../conf", config_name="redundancy")
def main(config: DictConfig) -> None:
    """Measure, and show a summary."""
    with clear_errors():
        from fastar.compare.redundancy import measure

        measure(config)


if __name__ == "__main__":
    main()
