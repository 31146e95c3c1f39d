"""Methods x seeds x protocols on one backbone: a table with spread, plots and a side-by-side video.

    python experiments/compare.py 'method=[dense,tempcache,window]' seeds=5
    python experiments/compare.py experiment=demo
    python experiments/compare.py -m experiment=ablation_threshold launcher=processes

The methods are the files of conf/method; conf/compare.yaml explains the settings. Every (method, seed, protocol) is a
run below outputs/<name>/. Given again, the command skips what is finished and goes on where it was interrupted.
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fastar.compare.command import check_choices
from fastar.sweep.job import run_job
from fastar.sweep.records import JobRecord

METHODS = Path(__file__).resolve().parent.parent / "conf/method"


@hydra.main(version_base=None, config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    """Run, then report."""
    run_job(config, Path(__file__).name, work)


def work(config: DictConfig, record: JobRecord | None) -> None:
    """One comparison; in a sweep, the report comes at its end."""
    from fastar.compare.job import compare

    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if not compare(config, record, report=not sweeping) and not sweeping:
        raise SystemExit(1)  # reasons have been told, and are in the report


if __name__ == "__main__":
    check_choices(sys.argv[1:], METHODS)
    main()
