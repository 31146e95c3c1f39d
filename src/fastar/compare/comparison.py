"""The sweep: every method, group of seeds and protocol is one run of the store, found, resumed, done or failed."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar import engines, interruption
from fastar.compare import methods as method_nodes
from fastar.compare.clips import RENDERED, AnyClips, check_source, load_clips
from fastar.compare.command import CAN_BE_PUT_RIGHT
from fastar.compare.passes import PLAIN, Passes
from fastar.compare.played import PLAYED, played_clip
from fastar.compare.prompt_clips import SOURCE, clips_of_seeds
from fastar.compare.protocols import PROTOCOLS, Protocols
from fastar.compare.runs import ComparisonRuns
from fastar.compare.session import Session
from fastar.compare.tasks import LATENTS, REFERENCE, Group, Task, read_latents
from fastar.metrics.quality import check_measures
from fastar.results import Run, run_id
from fastar.results.files import Unwritable
from fastar.results.loading import RESERVED
from fastar.results.lock import RunLocked
from fastar.results.logtail import sentence_of, unwrapped
from fastar.sparsity.base import check_choice

logger = logging.getLogger(__name__)

WAIT_SECONDS = 5
"""Between looks at runs that another process works on."""


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
    _said: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        config = self.config
        self.nodes = method_nodes.resolved(config)
        self.methods = {name: method_nodes.method_of(name, node) for name, node in self.nodes.items()}
        self.passes = Passes.of(config, self.session.device, config.protocols)
        self.store = ComparisonRuns(config, self.session, self.nodes, self.passes)
        self.seeds = list(range(config.seeds)) if isinstance(config.seeds, int) else list(config.seeds)
        self.metrics = {name: instantiate(node) for name, node in config.metrics.items()}
        self._protocols = Protocols(
            config, self.session, self.methods, self.metrics, self.seeds, lambda: self.advance(1)
        )
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
        extra = self._needs_reference and ("C" not in self.config.protocols or not self.passes.plain)
        per_group = len(self.config.protocols) * len(self.methods) + extra
        return len(self.groups) * per_group * self.chunks_per_run

    @property
    def report_id(self) -> str:
        """Names the comparison: all that its runs share; runs that differ in `budget_share` alone share it."""
        written: Any = OmegaConf.to_container(self.config.methods, resolve=False)
        protocols = {"methods": written, "protocols": list(self.config.protocols)}
        return run_id(
            protocols | self.store.shared(self.config.batch),
            seed=self.seeds,
            checkpoint_sha256=self.session.weights,
        )

    def planned(self) -> list[dict[str, Any]]:
        """Every run of this comparison: run_id, method, protocol, seeds and the other labels."""
        return [
            {
                "run_id": self.store.run_id(name, task.protocol, task.group.seeds, task.reference),
                "seeds": task.group.seeds,
                **self.store.labels(name, task.protocol, task.reference),
            }
            for task in self._tasks()
            for name in task.methods
        ]

    def run(self) -> None:
        """All runs. Those that another process works on come last, when it has finished them or is gone.

        Raises:
            Interrupted: the process was asked to stop; everything is saved.
        """
        todo = self._tasks()
        while todo:
            left = [rest for task in todo for rest in self._try(task)]
            if len(left) == len(todo):
                self._wait(left)
            todo = left

    def _tasks(self) -> list[Task]:
        """In order; the dense rollout of each group first."""
        tasks = []
        for seeds in self.groups:
            group = Group(seeds, self._load_clips, waits=self._needs_reference)
            if self._needs_reference:
                tasks.append(Task((REFERENCE,), "C", group, reference=True))
            for protocol in self.config.protocols:
                if protocol == "A":
                    tasks.append(Task(tuple(self.methods), "A", group))
                else:
                    again = protocol == "B" or not self.passes.plain  # the reference is another run
                    names = (name for name in self.methods if again or name != REFERENCE)
                    tasks += [Task((name,), protocol, group) for name in names]
        return tasks

    def _try(self, task: Task) -> list[Task]:
        """Do what can be done of a task now; what is left of it."""
        interruption.check()
        if task.group.waits and not task.reference:
            return [task]
        locked = self._attempt(task)
        if task.reference:
            task.group.waits = bool(locked)
        return [replace(task, methods=tuple(locked))] if locked else []

    def _wait(self, tasks: Sequence[Task]) -> None:
        """Until it makes sense to look again."""
        line = f"waiting for runs that other processes work on: {'; '.join(map(str, tasks[:3]))}"
        if line != self._said:
            self.say(line + (f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""))
            self._said = line
        for _ in range(WAIT_SECONDS):
            interruption.check()
            time.sleep(1)

    # -- runs of the store -----------------------------------------------------------------------------------------

    def _attempt(self, task: Task, *, retry_failed: bool | None = None) -> list[str]:
        """Do those of the task's runs that are not finished; methods whose run another process works on.

        A failure is recorded in the run and told; if several methods in lockstep fail, each is tried alone, so that
        the failure is the right one's.
        """
        locked = []
        try:
            with ExitStack() as stack:
                runs: dict[str, Run] = {}
                for name in task.methods:
                    try:
                        run = self.store.open(
                            name,
                            task.protocol,
                            task.group.seeds,
                            reference=task.reference,
                            retry_failed=retry_failed,
                        )
                    except RunLocked as error:
                        logger.info("%s", error)
                        locked.append(name)
                        continue
                    runs[name] = stack.enter_context(run)
                    if run.folder not in self.runs:
                        self.runs.append(run.folder)
                self._work(runs, task)
        except Unwritable:
            raise
        except Exception as error:  # whatever went wrong with one method leaves the others alone
            if not isinstance(unwrapped(error), (*CAN_BE_PUT_RIGHT, RuntimeError, MemoryError)):
                logger.exception("%s", task)  # a fault of the code
            if len(task.methods) > 1:
                self.say(f"{task}: all together failed ({sentence_of(error)}), now one by one")
                for name in (name for name in task.methods if name not in locked):
                    locked += self._attempt(replace(task, methods=(name,)), retry_failed=True)
            else:
                self.say(f"{task}: {sentence_of(error)}")
                if task.reference:
                    task.group.problem = sentence_of(error)
        return locked

    def _work(self, runs: Mapping[str, Run], task: Task) -> None:
        unfinished = {name: run for name, run in runs.items() if not run.finished}
        self.advance((len(runs) - len(unfinished)) * self.chunks_per_run)
        if unfinished:
            self._protocols.run_passes(PLAIN if task.reference else self.passes)
            self._protocols.run(task, unfinished)
        if task.reference and runs:
            task.group.reference = read_latents(runs[REFERENCE].folder / LATENTS).to(self.session.device)

    def _load_clips(self, seeds: Sequence[int]) -> AnyClips:
        config = self.config
        if config.source == SOURCE:
            return clips_of_seeds(config, self.session, seeds)
        if config.source == PLAYED:
            return played_clip(config, self.session.backbone.config, seeds)
        return load_clips(
            config.data, config.source, seeds, prefill=config.prefill_frames, generated=config.frames
        )

    # -- checks ----------------------------------------------------------------------------------------------------

    @property
    def _needs_reference(self) -> bool:
        return REFERENCE in self.methods

    def _check(self) -> None:
        config, chunk = self.config, self.session.chunk
        check_measures(self.metrics)
        check_source(config.data, config.source, self.session.backbone.config)
        if config.source in (SOURCE, PLAYED):
            self.session.eyes()
        for method in self.methods.values():
            if method.engine != "auto":
                engines.get(method.engine)
        for protocol in config.protocols:
            check_choice("protocols", protocol, PROTOCOLS)
        self._protocols.run_passes(self.passes)  # what cannot be run here says so now
        if {"A", "B"} & set(config.protocols) and not self._needs_reference:
            raise ValueError(f"protocols A and B need the method '{REFERENCE}': add it to method=[...]")
        reserved = set(config.columns) & set(RESERVED)
        if reserved:
            raise ValueError(
                f"a column of the results cannot be called {min(reserved)}: rename it in `columns`"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be a positive number or a list of different numbers, got {config.seeds}"
            )
        for name in ("batch", "save_every", "frames", "prefill_frames"):
            if config[name] < 1 and (name != "prefill_frames" or config.source in RENDERED):
                raise ValueError(f"{name} must be at least 1, got {config[name]}")
        for name in ("prefill_frames", "frames"):
            if config[name] % chunk:
                rounded = max(1, round(config[name] / chunk)) * chunk
                raise ValueError(
                    f"{name}={config[name]} is not a whole number of {chunk}-frame chunks: ask for {rounded}"
                )
