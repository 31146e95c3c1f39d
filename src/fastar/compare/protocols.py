"""What a comparison does in each protocol: rollouts of a group of seeds, which are scored into their runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from fastar.compare.free import Advance, Generated, free_run
from fastar.compare.lockstep import run_a, run_b
from fastar.compare.passes import PLAIN, Passes
from fastar.compare.scores import Scorer
from fastar.compare.session import Session
from fastar.compare.tasks import LATENTS, REFERENCE, Group, Task
from fastar.data.video import upscale, write_mp4
from fastar.results import Run
from fastar.results.files import atomic
from fastar.rollout.method import Method

PROTOCOLS = ("A", "B", "C")
VIDEO_SCALE, VIDEO_HEIGHT = (
    2,
    256,
)  # of lower ones: H.264 halves the colour resolution, which would show at 96 x 128


class Protocols:
    """Makes the runs of a comparison, once they are open.

    Args:
        config: of conf/compare.yaml.
        session: what it names, opened.
        methods, metrics: by name.
        seeds: of all groups, in order; `config.videos` of them are shown.
        advance: called after each chunk that was made.
    """

    def __init__(
        self,
        config: DictConfig,
        session: Session,
        methods: Mapping[str, Method],
        metrics: Mapping[str, Any],
        seeds: Sequence[int],
        advance: Advance,
    ) -> None:
        self.config, self.session, self.methods, self.metrics = config, session, methods, metrics
        self.seeds, self.advance = seeds, advance
        self._running = PLAIN

    def run_passes(self, passes: Passes) -> None:
        """Run the backbone so from now on."""
        if passes.execution != self._running.execution:
            passes.execution.apply(self.session.backbone.transformer)
        self._running = passes

    def run(self, task: Task, runs: Mapping[str, Run]) -> None:
        """Make those runs of a task that are not finished, by method."""
        work = {"A": self._lockstep_a, "B": self._lockstep_b, "C": self._free}[task.protocol]
        work(runs, task.group)

    def _free(self, runs: Mapping[str, Run], group: Group) -> None:
        [(name, run)] = runs.items()
        result = free_run(
            self.session, self.methods[name], group.clips, group.seeds, run, self._scorer(run, group),
            save_every=self.config.save_every, warmup_chunks=self.config.warmup_chunks,
            advance=self.advance, capture=self._running.capture,
        )  # fmt: skip
        if name == REFERENCE:
            with atomic(run.folder / LATENTS) as part:
                save_file({"latents": result.latents.contiguous()}, part)
        self._keep_videos(run, group, result)

    def _lockstep_a(self, runs: Mapping[str, Run], group: Group) -> None:
        scorers = {name: self._scorer(run, group) for name, run in runs.items()}
        methods = {name: self.methods[name] for name in runs}
        trajectory = self._trajectory(group)
        run_a(
            self.session, methods, group.clips, group.seeds, trajectory, scorers, self.advance,
            save_every=self.config.save_every, attention_chunks=self.config.attention_chunks,
        )  # fmt: skip

    def _lockstep_b(self, runs: Mapping[str, Run], group: Group) -> None:
        [(name, run)] = runs.items()
        scorer, trajectory = self._scorer(run, group), self._trajectory(group)
        run_b(
            self.session, self.methods[name], group.clips, group.seeds, trajectory, scorer,
            self.advance, save_every=self.config.save_every, capture=self._running.capture,
        )  # fmt: skip

    def _trajectory(self, group: Group) -> Tensor:
        if group.reference is None:
            raise ValueError(f"there is no dense trajectory: {group.problem}")
        given = self.session.beginning(group.clips)
        return torch.cat([given, group.reference], dim=1)

    def _scorer(self, run: Run, group: Group) -> Scorer:
        shown = group.seeds[0] in self.seeds[: self.config.videos]
        return Scorer(run, self.session, group.clips, self.metrics, group.reference, keep_words=shown)

    def _keep_videos(self, run: Run, group: Group, result: Generated) -> None:
        if result.shown is None:
            return
        shown, fps = set(self.seeds[: self.config.videos]), self.session.eyes().fps
        scale = VIDEO_SCALE if self.session.backbone.config.frame_size[0] < VIDEO_HEIGHT else 1
        for clip, seed in enumerate(group.seeds):
            if seed in shown:
                for name, frames in (("generated", result.shown), ("truth", group.clips.truth)):
                    if frames is None:
                        continue
                    path = run.videos / f"{name}_seed{seed}.mp4"
                    write_mp4(path, upscale(frames[clip], scale), fps=fps, crf=12)
                    for sink in run.sinks:
                        sink.video(path.stem, path)
