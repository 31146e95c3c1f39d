"""The sweep: every method, group of seeds and protocol is one run of the store, found, resumed, done or failed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastar import engines
from fastar.compare import methods as method_nodes
from fastar.compare.clips import SOURCES, Clips, load_clips
from fastar.compare.free import Generated, free_run
from fastar.compare.lockstep import run_a, run_b
from fastar.compare.scores import Scorer
from fastar.compare.session import Session
from fastar.data.video import upscale, write_mp4
from fastar.results import Run, RunStore, run_id
from fastar.results.files import atomic
from fastar.results.provenance import device_name
from fastar.sparsity.base import check_choice

PROTOCOLS = ("A", "B", "C")
REFERENCE = "dense"
"""The method whose free-running rollout is the trajectory of A and B and the truth of fidelity scores."""

FAILURES = (ValueError, RuntimeError, MemoryError)
"""What may go wrong with one method and leave the others alone: unsupported, out of memory, not finite."""

LATENTS = "latents.safetensors"
VIDEO_SCALE = 2  # H.264 halves the colour resolution, which would show at 96 x 128


@dataclass
class Group:
    """Seeds that share rollouts, and what their runs have in common, made when the first of them needs it."""

    seeds: list[int]
    load: Callable[[Sequence[int]], Clips]
    reference: Tensor | None = None

    @cached_property
    def clips(self) -> Clips:
        return self.load(self.seeds)


Work = Callable[[Mapping[str, Run], Group], None]
"""Does some runs, by method, of a group."""


@dataclass
class Comparison:
    """Runs what a config of conf/compare.yaml asks for.

    Args:
        config: composed.
        session: what it names, opened.
        advance: called after each chunk that was made, with the number of chunks; and for runs found finished.
        say: shows one line to the person.

    Attributes:
        runs: folders of all runs of this comparison, finished or failed, in order.
    """

    config: DictConfig
    session: Session
    advance: Callable[[int], None] = lambda chunks: None
    say: Callable[[str], None] = lambda line: None
    runs: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.nodes = method_nodes.resolved(config)
        self.methods = {name: method_nodes.method_of(name, node) for name, node in self.nodes.items()}
        weights = self.session.weights
        self.identities = {name: method_nodes.identity_of(node, weights) for name, node in self.nodes.items()}
        self.budgeted = method_nodes.budgeted(config.methods)
        self.seeds = list(range(config.seeds)) if isinstance(config.seeds, int) else list(config.seeds)
        self.metrics = {name: instantiate(node) for name, node in config.metrics.items()}
        self._check()

    @property
    def groups(self) -> list[list[int]]:
        """Seeds by rollout."""
        batch = self.config.batch
        return [self.seeds[start : start + batch] for start in range(0, len(self.seeds), batch)]

    @property
    def chunks_per_run(self) -> int:
        return int(self.config.frames) // self.session.chunk

    @property
    def total_chunks(self) -> int:
        """Chunks of all runs together."""
        extra = 0 if "C" in self.config.protocols or not self._needs_reference else 1
        per_group = len(self.config.protocols) * len(self.methods) + extra
        return len(self.groups) * per_group * self.chunks_per_run

    @property
    def report_id(self) -> str:
        """Names the comparison: all that its runs share; runs that differ in `budget_share` alone share it."""
        written: Any = OmegaConf.to_container(self.config.methods, resolve=False)
        protocols = {"methods": written, "protocols": list(self.config.protocols)}
        return run_id(
            protocols | self._setup(self.config.batch),
            seed=self.seeds,
            checkpoint_sha256=self.session.weights,
        )

    def run(self) -> None:
        """All runs, the reference of each group first."""
        for seeds in self.groups:
            group = Group(seeds, self._load_clips)
            if self._needs_reference:
                self._free(REFERENCE, group)
            for protocol in self.config.protocols:
                if protocol == "A":
                    self._all_in_lockstep(group)
                else:
                    for name in self.methods:
                        if protocol == "B":
                            self._attempt([name], "B", group, self._lockstep_b)
                        elif name != REFERENCE:
                            self._free(name, group)

    # -- the protocols ---------------------------------------------------------------------------------------------

    def _free(self, name: str, group: Group) -> None:
        def work(runs: Mapping[str, Run], group: Group) -> None:
            run = runs[name]
            result = free_run(
                self.session, self.methods[name], group.clips, group.seeds, run, self._scorer(run, group),
                save_every=self.config.save_every, warmup_chunks=self.config.warmup_chunks,
                advance=lambda: self.advance(1),
            )  # fmt: skip
            if name == REFERENCE:
                with atomic(run.folder / LATENTS) as part:
                    save_file({"latents": result.latents.contiguous()}, part)
            self._keep_videos(run, group, result)

        [folder] = self._attempt([name], "C", group, work)
        if name == REFERENCE and folder is not None and (folder / LATENTS).exists():
            group.reference = load_file(folder / LATENTS)["latents"].to(self.session.device)

    def _all_in_lockstep(self, group: Group) -> None:
        """Protocol A of all methods together; if one fails, each alone, so that the failure is the right one's."""
        together = list(self.methods)
        try:
            self._work(together, "A", group, self._lockstep_a)
        except FAILURES as error:
            self.say(f"protocol A of all methods together failed ({first_line(error)}): now one by one")
            for name in together:
                self._attempt([name], "A", group, self._lockstep_a)

    def _lockstep_a(self, runs: Mapping[str, Run], group: Group) -> None:
        scorers = {name: self._scorer(run, group) for name, run in runs.items()}
        methods = {name: self.methods[name] for name in runs}
        trajectory = self._trajectory(group)
        run_a(
            self.session, methods, group.clips, group.seeds, trajectory, scorers, lambda: self.advance(1),
            attention_chunks=self.config.attention_chunks,
        )  # fmt: skip

    def _lockstep_b(self, runs: Mapping[str, Run], group: Group) -> None:
        for name, run in runs.items():
            scorer, trajectory = self._scorer(run, group), self._trajectory(group)
            method = self.methods[name]
            run_b(self.session, method, group.clips, group.seeds, trajectory, scorer, lambda: self.advance(1))

    def _trajectory(self, group: Group) -> Tensor:
        if group.reference is None:
            raise ValueError(f"there is no dense trajectory: the method '{REFERENCE}' failed for these seeds")
        given = self.session.encode(group.clips.frames[:, : group.clips.prefill])
        return torch.cat([given, group.reference], dim=1)

    # -- runs of the store -----------------------------------------------------------------------------------------

    def _attempt(self, names: Sequence[str], protocol: str, group: Group, work: Work) -> list[Path | None]:
        """`_work`, except that a failure is noted and not raised; the folders of the runs, None if not accessible."""
        try:
            return list(self._work(names, protocol, group, work))
        except FAILURES as error:
            self.say(f"{', '.join(names)}, protocol {protocol}, seeds {group.seeds}: {first_line(error)}")
            return [None]

    def _work(self, names: Sequence[str], protocol: str, group: Group, work: Work) -> list[Path]:
        """Do those of the runs that are not finished; what fails them is recorded in them and raised."""
        with ExitStack() as stack:
            runs = {name: stack.enter_context(self._open(name, protocol, group)) for name in names}
            for run in runs.values():
                if run.folder not in self.runs:
                    self.runs.append(run.folder)
            open_runs = {name: run for name, run in runs.items() if not run.finished}
            self.advance((len(runs) - len(open_runs)) * self.chunks_per_run)
            if open_runs:
                work(open_runs, group)
        return [run.folder for run in runs.values()]

    def _open(self, name: str, protocol: str, group: Group) -> Run:
        config = self.config
        timed = protocol == "C"
        labels: dict[str, Any] = {"method": name, "protocol": protocol, "backbone": config.backbone.name}
        if name in self.budgeted:
            labels["budget_share"] = float(config.budget_share)
        identity = {"protocol": protocol, "method": self.identities[name], **self._setup(len(group.seeds))}
        if protocol == "A":
            identity["attention_chunks"] = config.attention_chunks
        if timed and self.session.device.type == "cpu":
            identity["threads"] = torch.get_num_threads()
        store = RunStore(config.paths.outputs, config.name, sinks=[instantiate(config.logger)])
        return store.open(
            identity,
            seed=group.seeds if len(group.seeds) > 1 else group.seeds[0],
            checkpoint_sha256=self.session.weights,
            timing_device=device_name(self.session.device) if timed else None,
            labels=labels,
            device=self.session.device,
        )

    def _setup(self, batch: int) -> dict[str, Any]:
        """What decides the numbers besides method, protocol, seeds and weights."""
        config = self.config
        data: Any = OmegaConf.to_container(config.data[config.source], resolve=True)
        own = ("clips", "frames", "history", "future")  # these follow from the settings below
        return {
            "source": config.source,
            "data": {key: value for key, value in data.items() if key not in own},
            "prefill_frames": config.prefill_frames,
            "frames": config.frames,
            "rollout": OmegaConf.to_container(config.rollout, resolve=True),
            "metrics": OmegaConf.to_container(config.metrics, resolve=True),
            "warmup_chunks": config.warmup_chunks,
            "dtype": config.dtype,
            "batch": batch,
        }

    def _scorer(self, run: Run, group: Group) -> Scorer:
        return Scorer(run, self.session, group.clips, self.metrics, group.reference)

    def _keep_videos(self, run: Run, group: Group, result: Generated) -> None:
        shown = set(self.seeds[: self.config.videos])
        for clip, seed in enumerate(group.seeds):
            if seed in shown:
                for name, frames in (("generated", result.shown), ("truth", group.clips.truth)):
                    path = run.videos / f"{name}_seed{seed}.mp4"
                    write_mp4(path, upscale(frames[clip], VIDEO_SCALE), crf=12)

    def _load_clips(self, seeds: Sequence[int]) -> Clips:
        config = self.config
        return load_clips(
            config.data, config.source, seeds, prefill=config.prefill_frames, generated=config.frames
        )

    # -- checks ----------------------------------------------------------------------------------------------------

    @property
    def _needs_reference(self) -> bool:
        return REFERENCE in self.methods

    def _check(self) -> None:
        config, chunk = self.config, self.session.chunk
        check_choice("source", config.source, SOURCES)
        for method in self.methods.values():
            if method.engine != "auto":
                engines.get(method.engine)
        for protocol in config.protocols:
            check_choice("protocols", protocol, PROTOCOLS)
        if {"A", "B"} & set(config.protocols) and not self._needs_reference:
            raise ValueError(f"protocols A and B need the method '{REFERENCE}': add it to method=[...]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be a positive number or a list of different numbers, got {config.seeds}"
            )
        for name in ("batch", "save_every", "frames", "prefill_frames"):
            if config[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {config[name]}")
        for name in ("prefill_frames", "frames"):
            if config[name] % chunk:
                rounded = max(1, round(config[name] / chunk)) * chunk
                raise ValueError(
                    f"{name}={config[name]} is not a whole number of {chunk}-frame chunks: ask for {rounded}"
                )


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
