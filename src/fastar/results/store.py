"""Where runs live: `<root>/<experiment>/<run_id>/`, found, skipped or resumed, never silently overwritten.

    store = RunStore("outputs", "demo")
    with store.open(config, seed=0, checkpoint_sha256=sha, labels={"method": "tempcache"}) as run:
        if not run.finished:
            rollout.load_state_dict(run.load_state()) if run.has_state else ...
            for chunk in ...:
                run.log({"psnr": 31.2}, chunk=chunk, frame=4 * chunk)
                run.save_state(rollout.state_dict())

summary.json   status (running, done, failed), labels, seed, config, environment, failure
metrics.jsonl  rows as they are logged; metrics.parquet replaces it when the run is complete
state.pt       what `save_state` kept, until the run is complete
log.txt        what was logged meanwhile
lock           while a process works on the run
videos/, ...   whatever the experiment adds
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fastar.results.identity import SCHEMA_VERSION, recorded_config, run_id
from fastar.results.launch import launch_id
from fastar.results.provenance import environment
from fastar.results.run import Run
from fastar.results.sinks import Sink


class RunStore:
    """The runs of one experiment.

    Args:
        root: folder of all outputs.
        experiment: name of the experiment, one folder below `root`.
        sinks: mirrors of every run that is worked on (W&B, CSV).
        force: do runs again that an earlier launch (see `fastar.results.launch`) has worked on, whatever came of them.
        retry_failed: False to leave a run that failed before as it is (`Run.finished` is then true).
    """

    def __init__(
        self,
        root: str | Path,
        experiment: str,
        *,
        sinks: Sequence[Sink] = (),
        force: bool = False,
        retry_failed: bool = True,
    ) -> None:
        self.folder = Path(root) / experiment
        self.experiment = experiment
        self.sinks = list(sinks)
        self.force, self.retry_failed = force, retry_failed

    def open(
        self,
        config: DictConfig | Mapping[str, Any],
        *,
        seed: int | Sequence[int],
        checkpoint_sha256: str | None = None,
        timing_device: str | None = None,
        labels: Mapping[str, str | int | float | bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> Run:
        """The run with this identity (see `fastar.results.run_id`): new, to be resumed, or finished already.

        Args:
            labels: columns of every row of this run in the loaded table, such as method and protocol. They describe the
                config and are not part of the identity.
            device: recorded in the environment.

        Raises:
            RunLocked: another process is working on it.
            ValueError: the folder cannot be written, or holds a damaged run.
        """
        identifier = run_id(
            config, seed=seed, checkpoint_sha256=checkpoint_sha256, timing_device=timing_device
        )
        summary = {
            "schema_version": SCHEMA_VERSION,
            "run_id": identifier,
            "experiment": self.experiment,
            "status": "running",
            "labels": dict(labels or {}),
            "seed": list(seed) if isinstance(seed, Sequence) else seed,
            "checkpoint_sha256": checkpoint_sha256,
            "config": recorded_config(config),
            "environment": environment(device=device, seeds=[seed] if isinstance(seed, int) else seed),
            "starts": 1,
            "launches": [launch_id()],
            "finished": None,
            "failure": None,
            "warnings": [],
        }
        over = ("done",) if self.retry_failed else ("done", "failed")
        return Run(self.folder / identifier, summary, sinks=self.sinks, over=over, force=self.force)
