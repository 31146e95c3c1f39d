"""One method, one rollout; what experiments/rollout.py runs."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.compare import methods as method_nodes
from fastar.compare.clips import Clips, render_clips, steered_clip
from fastar.compare.command import check_writable, progress_bar, wide_console
from fastar.compare.free import Generated, free_run
from fastar.compare.scores import Scorer
from fastar.compare.session import Session, open_session
from fastar.data.doom.script import read_actions
from fastar.data.video import side_by_side, write_mp4
from fastar.results import Run, RunStore, load
from fastar.results.provenance import device_name
from fastar.results.tables import pivot, spread, to_rich
from fastar.sweep.records import JobRecord

SHOWN = ("fps", "fps/steady", "cache_bytes", "byte_share", "density", "psnr/truth")


def roll(config: DictConfig, record: JobRecord | None = None) -> Path:
    """The finished run's folder."""
    nodes = method_nodes.resolved(config)
    if len(nodes) != 1:
        raise ValueError(f"a rollout takes one method, got {', '.join(nodes)}: use experiments/compare.py")
    [(name, node)] = nodes.items()
    console = wide_console()
    check_writable(Path(config.paths.outputs) / config.name)
    session = open_session(config)
    session.eyes()
    for setting in ("prefill_frames", "frames"):
        if config[setting] < 1 or config[setting] % session.chunk:
            raise ValueError(
                f"{setting}={config[setting]} must be a whole number of {session.chunk}-frame chunks"
            )
    clips = clip_of(config)
    with open_run(config, session, name, node, clips) as run:
        if record is not None:
            labels = {"protocol": "C", "backbone": config.backbone.name, "method": name}
            record.plan([{"run_id": run.run_id, "seeds": [config.seed], **labels}])
        if not run.finished:
            with progress_bar(console) as progress:
                task = progress.add_task(name, total=config.frames // session.chunk)
                scorer = Scorer(run, session, clips, {}, None)
                result = free_run(
                    session, method_nodes.method_of(name, node), clips, [config.seed], run, scorer,
                    save_every=config.save_every, warmup_chunks=config.warmup_chunks,
                    advance=lambda: progress.advance(task),
                )  # fmt: skip
            write_videos(run, name, clips, result)
    rows = load(run.folder)
    console.print(to_rich(pivot(spread(rows, metrics=SHOWN))))
    console.print(f"video and metrics: {run.folder}", highlight=False, soft_wrap=True)
    return run.folder


def clip_of(config: DictConfig) -> Clips:
    """True beginning, actions, and what the simulator shows for them."""
    if config.actions == "clip":
        prefill, generated = config.prefill_frames, config.frames
        return render_clips(config.data, "heldout", [config.seed], prefill=prefill, generated=generated)
    actions = read_actions(str(config.actions), config.frames, seed=config.seed)
    dataset = instantiate(config.data.heldout, frames=config.prefill_frames)
    return steered_clip(dataset, config.seed, actions, prefill=config.prefill_frames)


def open_run(config: DictConfig, session: Session, name: str, node: dict[str, Any], clips: Clips) -> Run:
    """The run of the store with these settings."""
    heldout: Any = OmegaConf.to_container(config.data.heldout, resolve=True)
    identity = {
        "method": method_nodes.identity_of(node, session.weights),
        "data": {key: value for key, value in heldout.items() if key not in ("clips", "frames", "seed")},
        "rollout": OmegaConf.to_container(config.rollout, resolve=True),
        "actions": clips.actions[0].tolist(),
        "prefill_frames": config.prefill_frames,
        "dtype": config.dtype,
        "warmup_chunks": config.warmup_chunks,
    }
    store = RunStore(
        config.paths.outputs, config.name, sinks=[instantiate(config.logger)], force=config.force
    )
    return store.open(
        identity,
        seed=config.seed,
        checkpoint_sha256=session.weights,
        timing_device=device_name(session.device),
        labels={"method": name, "backbone": config.backbone.name},
        device=session.device,
    )


def write_videos(run: Run, name: str, clips: Clips, result: Generated) -> None:
    """The rollout alone, and beside the simulator."""
    assert result.shown is not None
    write_mp4(run.videos / "rollout.mp4", result.shown[0])
    both = side_by_side({"simulator": clips.truth[0], name: result.shown[0]}, columns=2, scale=3)
    path = write_mp4(run.videos / "side_by_side.mp4", both)
    for sink in run.sinks:
        sink.video("side_by_side", path)
