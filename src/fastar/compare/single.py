"""One method, one rollout; what experiments/rollout.py runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastar.compare import methods as method_nodes
from fastar.compare.clips import Clips, render_clips, steered_clip
from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.free import free_run
from fastar.compare.played import PlayedClip, played_clip
from fastar.compare.prompted import PromptedClip, prompted_clip
from fastar.compare.scores import Scorer
from fastar.compare.session import Session, open_session, passes_of
from fastar.data.doom.script import read_actions
from fastar.data.video import side_by_side, write_mp4
from fastar.results import Run, RunStore, load
from fastar.results.provenance import device_name
from fastar.results.tables import pivot, spread, to_rich
from fastar.sweep.records import JobRecord

SHOWN = (
    "fps",
    "fps/steady",
    "cache_bytes",
    "byte_share",
    "density",
    "psnr/truth",
    "presence",
    "presence/changed",
)
AnyClip = Clips | PromptedClip | PlayedClip

LENGTHS = {"prefill_frames": 32, "frames": 160}
"""Of a rollout that plays on, where the config leaves them open."""


def roll(config: DictConfig, record: JobRecord | None = None) -> Path:
    """The finished run's folder."""
    name, node = one_method(config)
    console = wide_console()
    check_writable(Path(config.paths.outputs) / config.name)
    session = open_session(config)
    session.eyes()
    clips = clip_of(config, session)
    with open_run(config, session, name, node, clips) as run:
        if record is not None:
            labels = {"protocol": "C", "backbone": config.backbone.name, "method": name}
            record.plan([{"run_id": run.run_id, "seeds": [config.seed], **labels}])
        if not run.finished:
            with progress_bar(console) as progress:
                task = progress.add_task(name, total=(clips.end - clips.prefill) // session.chunk)
                scorer = Scorer(run, session, clips, {}, None)
                result = free_run(
                    session, method_nodes.method_of(name, node), clips, [config.seed], run, scorer,
                    save_every=config.save_every, warmup_chunks=config.warmup_chunks,
                    advance=lambda: progress.advance(task),
                )  # fmt: skip
            assert result.shown is not None
            if isinstance(clips, PromptedClip):
                clips.score(run, result.shown)
            write_videos(run, name, clips, result.shown, fps=session.eyes().fps)
    rows = load(run.folder)
    console.print(to_rich(pivot(spread(rows, metrics=SHOWN))))
    if isinstance(clips, PromptedClip) and clips.untold is not None:
        console.print(f"no truth to compare with: {clips.untold}", highlight=False, soft_wrap=True)
    console.print(f"video and metrics: {run.folder}", highlight=False, soft_wrap=True)
    return run.folder


def one_method(config: DictConfig) -> tuple[str, dict[str, Any]]:
    """Name and resolved node of the method that `config` asks for.

    Raises:
        ValueError: it asks for several, or none.
    """
    nodes = method_nodes.resolved(config)
    if len(nodes) != 1:
        raise ValueError(f"a rollout takes one method, got {', '.join(nodes)}: use experiments/compare.py")
    return next(iter(nodes.items()))


def clip_of(config: DictConfig, session: Session) -> AnyClip:
    """What is given of the video, and what is known about the rest.

    Raises:
        FileNotFoundError, ValueError: settings that make no sense together.
    """
    backbone = session.backbone.config
    if backbone.transformer.action_module is not None:
        return played_clip(config, backbone, [config.seed])
    if backbone.transformer.text_dim is not None:
        return prompted_clip(config, session.chunk)
    if config.prompts is not None:
        raise ValueError(
            f"the backbone '{config.backbone.name}' reads no prompts: add backbone=scenes data=scenes"
        )
    return simulated_clip(config, session.chunk)


def simulated_clip(config: DictConfig, chunk: int) -> Clips:
    """A true beginning, actions, and what the simulator shows for them."""
    lengths = {name: default if config[name] is None else config[name] for name, default in LENGTHS.items()}
    for setting, frames in lengths.items():
        if frames < 1 or frames % chunk:
            raise ValueError(f"{setting}={frames} must be a whole number of {chunk}-frame chunks")
    prefill, generated = lengths["prefill_frames"], lengths["frames"]
    if config.actions == "clip":
        return render_clips(config.data, "heldout", [config.seed], prefill=prefill, generated=generated)
    actions = read_actions(str(config.actions), generated, seed=config.seed)
    dataset = instantiate(config.data.heldout, frames=prefill)
    return steered_clip(dataset, config.seed, actions, prefill=prefill)


def open_run(config: DictConfig, session: Session, name: str, node: dict[str, Any], clips: AnyClip) -> Run:
    """The run of the store with these settings."""
    if not isinstance(clips, Clips):
        given = clips.identity()
    else:
        heldout: Any = OmegaConf.to_container(config.data.heldout, resolve=True)
        given = {
            "data": {key: value for key, value in heldout.items() if key not in ("clips", "frames", "seed")},
            "actions": clips.actions[0].tolist(),
            "prefill_frames": clips.prefill,
        }
    arguments = run_arguments(config, session, name, node, given, config.seed, {})
    return store_of(config).open(**arguments, device=session.device)


def store_of(config: DictConfig) -> RunStore:
    """Where rollouts are kept."""
    return RunStore(config.paths.outputs, config.name, sinks=[instantiate(config.logger)], force=config.force)


def run_arguments(
    config: DictConfig,
    session: Session,
    name: str,
    node: Mapping[str, Any],
    given: Mapping[str, Any],
    seed: int,
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """Arguments of `RunStore.open` for the rollout of a method, of what is `given` of the video."""
    identity = {
        "method": method_nodes.identity_of(node, session.weights),
        **given,
        "rollout": passes_of(config.rollout),
        "dtype": config.dtype,
        "warmup_chunks": config.warmup_chunks,
    }
    return {
        "config": identity | session.parts,
        "seed": seed,
        "checkpoint_sha256": session.weights,
        "timing_device": device_name(session.device),
        "labels": {"method": name, "backbone": config.backbone.name, **labels},
    }


def write_videos(run: Run, name: str, clips: AnyClip, shown: Tensor, *, fps: float) -> None:
    """The rollout alone, and, if it is known, beside what the simulator or the prompts say."""
    path = write_mp4(run.videos / "rollout.mp4", shown[0], fps=fps)
    if clips.truth is not None:
        told = "script" if isinstance(clips, PromptedClip) else "simulator"
        both = side_by_side({told: clips.truth[0], name: shown[0]}, columns=2, scale=3)
        path = write_mp4(run.videos / "side_by_side.mp4", both, fps=fps)
    for sink in run.sinks:
        sink.video(path.stem, path)
