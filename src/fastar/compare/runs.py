"""The runs of a comparison in the store: what identifies each of them, and how they are labelled."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.backbones.text import checksum_of
from fastar.compare import methods as method_nodes
from fastar.compare.passes import PLAIN, Passes
from fastar.compare.played import PLAYED, played_identity
from fastar.compare.prompt_clips import SOURCE, set_identity
from fastar.compare.session import Session, passes_of
from fastar.results import Run, RunStore, run_id
from fastar.results.provenance import device_name

OWN_LENGTHS = ("clips", "frames", "history", "future")
"""Settings of a data set that follow from those of the comparison."""


class ComparisonRuns:
    """Opens the runs of a comparison.

    Args:
        config: of conf/compare.yaml.
        session: what it names, opened.
        nodes: resolved nodes of all methods, by name.
        passes: how those of all runs are run, but for the dense rollout that they are held against.

    Raises:
        ValueError: a method names a file that is missing, damaged or of other weights.
    """

    def __init__(
        self,
        config: DictConfig,
        session: Session,
        nodes: Mapping[str, Mapping[str, Any]],
        passes: Passes = PLAIN,
    ) -> None:
        self.config, self.session, self.nodes, self.passes = config, session, nodes, passes
        self.identities = {
            name: method_nodes.identity_of(node, session.weights) for name, node in nodes.items()
        }
        self.budgeted = method_nodes.budgeted(config.methods)

    def open(
        self,
        name: str,
        protocol: str,
        seeds: Sequence[int],
        *,
        reference: bool = False,
        retry_failed: bool | None = None,
    ) -> Run:
        """The run of a method, protocol and rollout; `retry_failed` as in the config unless given.

        `reference`: it is the dense rollout that the others are held against.

        Raises:
            RunLocked: another process is working on it.
        """
        config = self.config
        store = RunStore(
            config.paths.outputs,
            config.name,
            sinks=[instantiate(config.logger)],
            force=config.force,
            retry_failed=config.retry_failed if retry_failed is None else retry_failed,
        )
        return store.open(
            **self._key(name, protocol, seeds, reference),
            labels=self.labels(name, protocol, reference),
            device=self.session.device,
        )

    def run_id(self, name: str, protocol: str, seeds: Sequence[int], reference: bool = False) -> str:
        """What `open` would find or make."""
        key = self._key(name, protocol, seeds, reference)
        return run_id(key.pop("config"), **key)

    def labels(self, name: str, protocol: str, reference: bool = False) -> dict[str, Any]:
        """Columns of a run in the loaded table: method, protocol, backbone, its budget, and those in `columns`.

        `passes`, too, where these are not eager.
        """
        config = self.config
        labels: dict[str, Any] = {"method": name, "protocol": protocol, "backbone": config.backbone.name}
        if name in self.budgeted:
            labels["budget_share"] = float(config.budget_share)
        if not (reference or self.passes.plain):
            labels["passes"] = str(self.passes)
        for column, path in config.columns.items():
            found = method_nodes.setting(self.nodes[name], path)
            if found is not None:
                labels[column] = found
        return labels

    def shared(self, batch: int, reference: bool = False) -> dict[str, Any]:
        """What decides the numbers besides method, protocol, seeds and weights."""
        config = self.config
        shared = {
            "source": config.source,
            "data": self._data_identity,
            "prefill_frames": config.prefill_frames,
            "frames": config.frames,
            "rollout": passes_of(config.rollout),
            "metrics": OmegaConf.to_container(config.metrics, resolve=True),
            "warmup_chunks": config.warmup_chunks,
            "dtype": config.dtype,
            "batch": batch,
        }
        return shared | self.session.parts | ({} if reference else self.passes.identity())

    @cached_property
    def _data_identity(self) -> dict[str, Any]:
        """What decides the clips, wherever the files they are made of lie."""
        config = self.config
        if config.source == SOURCE:
            return set_identity(config)
        if config.source == PLAYED:
            return played_identity(config)
        data: Any = OmegaConf.to_container(config.data[config.source], resolve=True)
        if data.get("encoder"):
            data["encoder"] = checksum_of(data["encoder"]["folder"])
        return {key: value for key, value in data.items() if key not in OWN_LENGTHS}

    def _key(self, name: str, protocol: str, seeds: Sequence[int], reference: bool) -> dict[str, Any]:
        """Arguments of `fastar.results.run_id`."""
        timed = protocol == "C"
        shared = self.shared(len(seeds), reference)
        identity = {"protocol": protocol, "method": self.identities[name], **shared}
        if protocol == "A":
            identity["attention_chunks"] = self.config.attention_chunks
        if timed and self.session.device.type == "cpu":
            identity["threads"] = torch.get_num_threads()
        return {
            "config": identity,
            "seed": list(seeds) if len(seeds) > 1 else seeds[0],
            "checkpoint_sha256": self.session.weights,
            "timing_device": device_name(self.session.device) if timed else None,
        }
