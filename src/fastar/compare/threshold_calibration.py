"""What each layer of a backbone loses by merging from a threshold on; what experiments/calibrate_thresholds.py runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.cache import TempCachePaper, ThresholdErrors
from fastar.compare.clips import AnyClips, check_source, load_clips
from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.lockstep import evenly
from fastar.compare.session import Session, open_session
from fastar.metrics.redundancy import BoundProbe
from fastar.metrics.redundancy.means import Means
from fastar.results.card import made_with
from fastar.results.files import atomic
from fastar.results.tables import to_rich
from fastar.rollout.method import Method
from fastar.rollout.protocols import TeeCache

KINDS = {"measured": "output_error", "first_order": "error_first_order", "bound": "error_bound"}
"""Of `fastar.metrics.redundancy.bound.ErrorBounds`, by `ErrorKind`."""


class Merging:
    """Caches that merge from different thresholds on, filled with the keys of one dense rollout (protocol A).

    Args:
        session: opened.
        make: makes a cache of a threshold.
        thresholds: ascending.
        every: queries looked at, one in so many.
    """

    def __init__(
        self,
        session: Session,
        make: Callable[[float], TempCachePaper],
        thresholds: Sequence[float],
        *,
        every: int,
    ) -> None:
        self.session, self.make, self.thresholds, self.every = session, make, thresholds, every
        sizes = session.backbone.config.transformer
        self._sizes = (sizes.num_layers, sizes.num_heads)
        self._errors = {kind: Means(sizes.num_layers, len(thresholds)) for kind in KINDS}
        self._slots = Means(sizes.num_layers, len(thresholds))
        self._looks = False

    def run(self, clips: AnyClips, seed: int, look_at: Sequence[int]) -> None:
        """Push a clip of true frames through, looking at the denoising passes of chunks that start at `look_at`."""
        session, step = self.session, self.session.chunk
        caches = {str(threshold): self.make(threshold) for threshold in self.thresholds}
        dense = Method(name="dense")
        teacher = session.start(
            dense, [seed], prompts=clips.prompts, cache=TeeCache(dense.cache(), list(caches.values()))
        )
        students = {
            name: session.start(Method(name=name), [seed], prompts=clips.prompts, cache=cache)
            for name, cache in caches.items()
        }
        self._states = {name: student.state for name, student in students.items()}
        self._probe = BoundProbe(self._states, *self._sizes, every=self.every)
        teacher.state.recorders.append(self)
        latents = session.beginning(clips)
        for first in range(0, clips.prefill, step):
            part = slice(first, first + step)
            actions = clips.actions_in(part)
            if first in look_at:
                for student in students.values():
                    student.follow(teacher)
                self._looks = True
                teacher.denoise(actions)
                self._looks = False
                self._count(caches, first * session.backbone.config.tokens_per_frame)
            teacher.commit(latents[:, part], actions)
        for number, name in enumerate(caches):
            found = self._probe.compute(name)
            for kind, metric in KINDS.items():
                self._errors[kind].update((slice(None), number), found[metric].mean(1))

    def on_attend(self, event: AttendEvent) -> None:
        """Show a call of the dense rollout to all caches."""
        if self._looks and event.stream == "self":
            for name, state in self._states.items():
                self._probe.look(name, event, state.replay(event))

    def result(self, weights: str | None) -> ThresholdErrors:
        """Means over clips, for the checkpoint of sha256 `weights`."""
        errors = {kind: _curves(table.compute()) for kind, table in self._errors.items()}
        settings = self.make(self.thresholds[0]).settings()
        return ThresholdErrors(
            tuple(self.thresholds), errors, _curves(self._slots.compute()), settings, weights
        )

    def _count(self, caches: dict[str, TempCachePaper], tokens: int) -> None:
        """What the caches keep of `tokens` a head."""
        for number, cache in enumerate(caches.values()):
            for layer in range(self._sizes[0]):
                live = cache.view(layer).log_count
                assert live is not None
                used = (live > -torch.inf).float().sum(-1).mean()
                self._slots.update((layer, number), used / tokens)


def _curves(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _shown(found: ThresholdErrors) -> pd.DataFrame:
    """Measured error and slots left, a line a threshold, a column a layer."""
    tables = zip(found.errors["measured"], found.slots, strict=True)
    cells = [[f"{e:.3f}, {s:.0%}" for e, s in zip(errors, slots, strict=True)] for errors, slots in tables]
    thresholds = [f"{threshold:g}" for threshold in found.thresholds]
    lines = [list(line) for line in zip(thresholds, *cells, strict=True)]
    return pd.DataFrame(
        lines, columns=["error, slots from", *(f"layer {i}" for i in range(found.num_layers))]
    )


@torch.inference_mode()
def calibrate_thresholds(config: DictConfig) -> ThresholdErrors:
    """The errors of all layers, also written to `output`.

    Raises:
        FileNotFoundError, ValueError: settings that make no sense, alone or together.
    """
    check_writable(Path(config.output).parent, "output")
    session, console = open_session(config), wide_console()
    check_source(config.data, config.source, session.backbone.config)
    if config.frames < 2 * session.chunk or config.frames % session.chunk or config.looks < 1:
        raise ValueError(
            f"frames={config.frames} must be a whole number of {session.chunk}-frame chunks, at least two, and "
            f"looks={config.looks} at least 1"
        )
    thresholds = sorted(config.thresholds)
    if "threshold" not in config.cache or not thresholds or len(set(thresholds)) < len(thresholds):
        raise ValueError(
            f"thresholds={thresholds} must be different numbers, and the cache one that merges by a threshold: "
            "cache=tempcache_paper"
        )
    merging = Merging(
        session,
        lambda threshold: instantiate(config.cache, threshold=threshold),
        thresholds,
        every=config.every,
    )
    look_at = evenly(session.chunk, config.frames, session.chunk, config.looks)
    with progress_bar(console) as progress:
        task = progress.add_task("clips", total=config.clips)
        for seed in range(config.clips):
            clips = load_clips(config.data, config.source, [seed], prefill=config.frames, generated=0)
            merging.run(clips, seed, look_at)
            progress.advance(task)
    found = merging.result(session.weights)
    named = ("seed", "source", "clips", "frames", "looks", "every")
    made = made_with(session.weights, session.loop.timesteps, session.device)
    with atomic(Path(config.output)) as part:
        found.save(part, made=made, settings={name: config[name] for name in named})
    console.print(to_rich(_shown(found)))
    console.print(f"written: {config.output}", highlight=False, soft_wrap=True)
    return found
