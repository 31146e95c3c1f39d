"""Redundancy of a backbone's attention on held-out clips; what experiments/redundancy.py runs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar import interruption
from fastar.attention.events import AttendEvent
from fastar.compare import methods as method_nodes
from fastar.compare.clips import AnyClips, check_source, load_clips
from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.lockstep import evenly
from fastar.compare.session import RANDOM, Session, open_session
from fastar.data.doom.dataset import DoomClips, clip_truth
from fastar.data.doom.motion import DoomMotion
from fastar.data.motion import Motion
from fastar.data.scenes.dataset import ScenesClips
from fastar.data.scenes.motion import ScenesMotion
from fastar.metrics.redundancy import BoundProbe, RedundancyRecorder
from fastar.metrics.redundancy.rows import pictures_of, rows_of
from fastar.results import Run, RunStore, load
from fastar.results.qualifiers import table_rows
from fastar.results.tables import pivot, spread, to_rich
from fastar.rollout.method import Method
from fastar.rollout.protocols import TeeCache
from fastar.rollout.rollout import Rollout
from fastar.sparsity import Dense

DENSE = "dense"
SHOWN = {
    "raw keys >= .9": "key_above/space=raw/kind=cosine/pairs=nearest/threshold=0.9",
    "random pairs": "key_above/space=raw/kind=cosine/pairs=random/threshold=0.9",
    "centred": "key_above/space=raw/kind=centred/pairs=nearest/threshold=0.9",
    "loss-free": "key_identical/space=roped",
    "recall at 30 %": "top_recall/entries=query/density=0.3",
    "in blocks": "top_recall/entries=blocks/density=0.3",
    "output error": "output_error",
    "bound": "error_bound",
}
"""Means over layers that the command shows, of the metrics whose names have these qualifiers."""


def measure(config: DictConfig) -> list[Path]:
    """The runs' folders, one a method, in order.

    Raises:
        FileNotFoundError, ValueError: settings that make no sense, alone or together.
    """
    console, nodes = wide_console(), method_nodes.resolved(config)
    check_writable(Path(config.paths.outputs) / config.name)
    session = open_session(config)
    check_source(config.data, config.source, session.backbone.config)
    if config.frames < 2 * session.chunk or config.frames % session.chunk:
        raise ValueError(
            f"frames={config.frames} must be a whole number of {session.chunk}-frame chunks, and at least two"
        )
    if config.looks < 1:
        raise ValueError(f"looks={config.looks} leaves nothing to measure: use at least 1")
    layers = session.backbone.config.transformer.num_layers
    if config.pca_layer is not None and not 0 <= config.pca_layer < layers:
        raise ValueError(f"pca_layer={config.pca_layer}: the backbone has layers 0 to {layers - 1}")
    seeds = list(range(config.seeds)) if isinstance(config.seeds, int) else list(config.seeds)
    with ExitStack() as stack, progress_bar(console) as progress:
        runs = {
            name: stack.enter_context(_open(config, session, name, node, seeds))
            for name, node in nodes.items()
        }
        todo = {
            name: method_nodes.method_of(name, nodes[name]) for name, run in runs.items() if not run.finished
        }
        task = progress.add_task("chunks", total=len(seeds) * config.frames // session.chunk if todo else 0)
        for number, seed in enumerate(seeds if todo else []):
            clip = Measured(config, session, todo, seed)
            clip.run(lambda: progress.advance(task))
            for name in todo:
                clip.log(runs[name], name, number, pictures=number == 0)
            interruption.check()
        folders = [run.folder for run in runs.values()]
    rows = load(folders)
    shown = {name: _matching(rows["metric"], pattern) for name, pattern in SHOWN.items()}
    rows = rows.assign(
        metric=[next((n for n, hits in shown.items() if hits[i]), None) for i in range(len(rows))]
    )
    console.print(to_rich(pivot(spread(rows[rows["metric"].notna()], metrics=list(SHOWN)))))
    console.print(
        f"all numbers, by layer: {Path(config.paths.outputs) / config.name}", highlight=False, soft_wrap=True
    )
    return folders


def _matching(names: Any, pattern: str) -> list[bool]:
    metric, *wanted = pattern.split("/")
    parts = [name.split("/") for name in names]
    return [own == metric and set(wanted) <= set(given) for own, *given in parts]


@dataclass
class _Watch:
    """Recorder of the dense rollout: shows its calls, or what methods make of them, to their recorders."""

    recorders: dict[str, RedundancyRecorder]
    probe: BoundProbe
    active: bool = False

    def on_attend(self, event: AttendEvent) -> None:
        for name, recorder in self.recorders.items():
            recorder.active = self.active
            if name == DENSE:
                recorder.on_attend(event)
            elif event.stream == "self" and self.active:
                replayed = recorder.state.replay(event)
                recorder.on_attend(replayed)
                if name in self.probe.states and not event.context.commits:
                    self.probe.look(name, event, replayed)


class Measured:
    """One clip of a seed, as several methods see it.

    Args:
        config: composed.
        session: what it names, opened.
        methods: by name.
        seed: of the clip.
    """

    def __init__(
        self, config: DictConfig, session: Session, methods: Mapping[str, Method], seed: int
    ) -> None:
        self.config, self.session = config, session
        self.clips = load_clips(config.data, config.source, [seed], prefill=config.frames, generated=0)
        sizes = session.backbone.config.transformer
        self._sizes = (sizes.num_layers, sizes.num_heads)
        others = {name: method for name, method in methods.items() if name != DENSE}
        caches = {name: method.cache() for name, method in others.items()}
        dense = Method(name=DENSE)
        prompts = self.clips.prompts
        self.teacher = session.start(
            dense, [seed], prompts=prompts, cache=TeeCache(dense.cache(), list(caches.values()))
        )
        self.students: dict[str, Rollout] = {
            name: session.start(method, [seed], prompts=prompts, cache=caches[name])
            for name, method in others.items()
        }
        merging = {
            name: student.state
            for name, student in self.students.items()
            if isinstance(student.state.self_selector, Dense)
        }
        states = {
            name: self.students[name].state if name in others else self.teacher.state for name in methods
        }
        motion = motion_of(config, self.clips, seed, self.teacher.state.grid)
        recorders = {
            name: RedundancyRecorder(
                state,
                *self._sizes,
                motion=motion,
                every=config.every,
                query_blocks=config.query_blocks,
                block_q=config.block_queries,
                block_k=config.block_keys,
                pca_layer=config.pca_layer if name == DENSE else None,
            )
            for name, state in states.items()
        }
        self.watch = _Watch(recorders, BoundProbe(merging, *self._sizes, every=config.every))
        self.teacher.state.recorders.append(self.watch)

    def run(self, advance: Callable[[], None]) -> None:
        """Push the clip through, looking on the way; `advance` is called after each chunk."""
        latents, step = self.session.beginning(self.clips), self.session.chunk
        look_at = evenly(step, self.config.frames, step, self.config.looks)
        for first in range(0, self.config.frames, step):
            part = slice(first, first + step)
            actions = self.clips.actions_in(part)
            for student in self.students.values():
                student.follow(self.teacher)
            self.watch.active = first in look_at
            if self.watch.active:
                self.teacher.denoise(actions)
            self.teacher.commit(latents[:, part], actions)
            advance()

    def log(self, run: Run, name: str, clip: int, *, pictures: bool) -> None:
        """Write what was measured of a method as rows of clip number `clip`."""
        recorder = self.watch.recorders[name]
        run.log(rows_of(recorder), clip=clip)
        for key, table in self.watch.probe.compute(name).items():
            run.log(table_rows(key, table.nanmean(1), layer=range(self._sizes[0])), clip=clip)
        for frame, values in pictures_of(recorder) if pictures else ():
            run.log(values, clip=clip, frame=frame)


def motion_of(config: DictConfig, clips: AnyClips, seed: int, grid: tuple[int, int]) -> Motion | None:
    """The truth about the motion in a clip; None where nobody knows."""
    if config.source != "heldout":
        return None
    dataset = instantiate(config.data.heldout, frames=config.frames)
    if isinstance(dataset, DoomClips):
        shown = clip_truth(dataset.plan(seed)[1])
        return DoomMotion(shown["pose"], shown["depth"], grid)
    if isinstance(dataset, ScenesClips):
        return ScenesMotion(dataset.script(seed), grid)
    return None


def _open(config: DictConfig, session: Session, name: str, node: Mapping[str, Any], seeds: list[int]) -> Run:
    """The run of the store with these settings."""
    named = ("source", "frames", "looks", "every", "query_blocks", "pca_layer", "dtype", "seed")
    blocks = {key: config[key] for key in ("block_queries", "block_keys")}
    identity = {
        "method": method_nodes.identity_of(node, session.weights),
        "data": OmegaConf.to_container(config.data[config.source], resolve=True),
        "rollout": OmegaConf.to_container(config.rollout, resolve=True),
        **{key: config[key] for key in named},
        **blocks,
    }
    weights = RANDOM if config.checkpoint == RANDOM else "trained"
    store = RunStore(
        config.paths.outputs, config.name, sinks=[instantiate(config.logger)], force=config.force
    )
    return store.open(
        identity,
        seed=seeds,
        checkpoint_sha256=session.weights,
        labels={"method": name, "backbone": config.backbone.name, "weights": weights},
        device=session.device,
    )
