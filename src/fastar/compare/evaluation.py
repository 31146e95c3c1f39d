"""The numbers of a backbone's model card, on held-out worlds and textures; what experiments/evaluate.py runs."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from fastar.backbones import Backbone, load_backbone
from fastar.cache import EmptyCache, WindowCache
from fastar.compare.session import best_device
from fastar.data.doom.camera import Action
from fastar.data.pixels import to_model_range, to_uint8
from fastar.data.video import contact_sheet
from fastar.metrics.bootstrap import interval, paired_difference
from fastar.metrics.fidelity import frame_psnr
from fastar.metrics.flow import LEFT, RIGHT, TurnAgreement
from fastar.metrics.frechet import FrechetDistance
from fastar.metrics.revisit import masked_psnr
from fastar.results.card import evaluation_page, made_with
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class Evaluation:
    """A backbone, its loop and the place where results go."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.device = torch.device(config.device if config.device != "auto" else best_device())
        self.backbone: Backbone = load_backbone(config.checkpoint, device=self.device)
        if self.backbone.autoencoder is None:
            raise ValueError(
                f"{config.checkpoint} has no autoencoder to see pixels with: use another checkpoint"
            )
        self.autoencoder = self.backbone.autoencoder
        self.loop: ChunkLoop = instantiate(config.rollout, chunk_frames=self.backbone.config.chunk_frames)
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.made = made_with(self.backbone.sha256, self.loop.timesteps, self.device)
        self.started = time.monotonic()

    def clips(self, name: str, count: int, **options: Any) -> Iterator[Batch]:
        """Batches of `count` clips of the data set `name`, on the device."""
        dataset = instantiate(self.config.data[name], clips=count, **options)
        loader = DataLoader(dataset, batch_size=self.config.batch, num_workers=self.config.num_workers)
        for batch in loader:
            yield {key: value.to(self.device) for key, value in batch.items()}

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> latents, a few frames at a time."""
        parts = [self.autoencoder.encode(to_model_range(part)) for part in frames.split(32, dim=1)]
        return torch.cat(parts, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> uint8 frames, a few frames at a time."""
        return torch.cat(
            [to_uint8(self.autoencoder.decode(part)) for part in latents.split(32, dim=1)], dim=1
        )

    def rollout(self, batch: int, method: Method | None = None, first_seed: int = 0) -> Any:
        """A fresh rollout, dense unless a method is given."""
        seeds = [self.config.seed * 100_000 + first_seed + i for i in range(batch)]
        return start_rollout(self.backbone, method or Method(name="dense"), loop=self.loop, seeds=seeds)

    def report(self, measure: str, **values: Any) -> None:
        """Write one result, in place of an earlier one of the same measure, and show it."""
        row = {
            "measure": measure,
            "seconds": round(time.monotonic() - self.started, 1),
            **values,
            "made": self.made,
        }
        path = self.output / "backbone.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        others = [line for line in lines if json.loads(line)["measure"] != measure]
        lines = [*others, json.dumps(row)]
        path.write_text("\n".join(lines) + "\n")
        (self.output / "backbone.md").write_text(evaluation_page([json.loads(line) for line in lines]))
        log.info("%s", row)


def run(config: DictConfig) -> None:
    """Run the measures named in `measures` and write their results."""
    known = {
        "autoencoder": autoencoder_psnr,
        "next_frame": next_frame_psnr,
        "actions": action_following,
        "memory": memory,
        "drift": drift,
    }
    unknown = [name for name in config.measures if name not in known]
    if unknown:
        raise ValueError(f"unknown measure '{unknown[0]}': choose from {', '.join(known)}")
    torch.set_float32_matmul_precision("high")
    evaluation = Evaluation(config)
    with torch.inference_mode():
        for name in config.measures:
            known[name](evaluation)


def autoencoder_psnr(ev: Evaluation) -> None:
    """PSNR of decode(encode(frame)) on held-out frames, mean over clips of the clips' mean."""
    values = []
    for batch in ev.clips("heldout", ev.config.clips, frames=32):
        values += frame_psnr(ev.decode(ev.encode(batch["frames"])), batch["frames"]).mean(dim=1).tolist()
    report = interval(values)
    ev.report("autoencoder_psnr", mean=report.mean, low=report.low, high=report.high, clips=report.n)


def next_frame_psnr(ev: Evaluation) -> None:
    """First frame after true history, where the camera moves; beside it, copying the last true frame."""
    chunk, history = ev.loop.chunk_frames, ev.backbone.config.context_frames
    rows: dict[str, list[float]] = {"model": [], "copy": [], "bound": [], "chunk": []}
    for batch in ev.clips("heldout", ev.config.clips, frames=history + chunk):
        frames, actions = batch["frames"], batch["actions"]
        latents = ev.encode(frames)
        rollout = ev.rollout(len(frames))
        rollout.prefill(latents[:, :history], actions[:, :history])
        generated = ev.decode(rollout.denoise(actions[:, history:]))
        truth, last = frames[:, history:], frames[:, history - 1 : history]
        moved = actions[:, history] != Action.NONE
        rows["model"] += frame_psnr(generated[:, :1], truth[:, :1])[moved].flatten().tolist()
        rows["copy"] += frame_psnr(last, truth[:, :1])[moved].flatten().tolist()
        rows["bound"] += frame_psnr(ev.decode(latents[:, history:]), truth)[moved, :1].flatten().tolist()
        rows["chunk"] += frame_psnr(generated, truth)[moved].mean(dim=1).tolist()
    gain = paired_difference(rows["model"], rows["copy"])
    means = {f"{name}_psnr": interval(values).mean for name, values in rows.items()}
    ev.report("next_frame", **means, gain=gain.mean, gain_low=gain.low, gain_high=gain.high, clips=gain.n)


def action_following(ev: Evaluation) -> None:
    """Share of held turns whose optical flow has the right sign; one chunk of turning after 32 true frames."""
    agreement = TurnAgreement()
    turn = {LEFT: int(Action.TURN_LEFT), RIGHT: int(Action.TURN_RIGHT)}
    tries = 0
    for batch in ev.clips("heldout", ev.config.turns // 2, frames=32):
        latents = ev.encode(batch["frames"])
        for direction, action in turn.items():
            rollout = ev.rollout(len(latents), first_seed=tries)
            rollout.prefill(latents, batch["actions"])
            actions = torch.full((len(latents), ev.loop.chunk_frames), action, device=ev.device)
            generated = ev.decode(rollout.denoise(actions))
            seen = torch.cat([batch["frames"][:, -1:], generated], dim=1)
            agreement.update(seen.cpu(), torch.full((len(latents),), direction))
            tries += len(latents)
    ev.report("action_following", share=float(agreement.compute()), tries=tries)


def memory(ev: Evaluation) -> None:
    """Dense against a 16-frame window where pixels return that the window forgot: true history, way back generated."""
    methods = {
        "dense": Method(name="dense"),
        "window_16": Method(name="window", cache=lambda: WindowCache(budget_frames=16.4)),
        "empty": Method(name="empty", cache=EmptyCache),
    }
    scores: dict[str, list[float]] = {name: [] for name in [*methods, "bound"]}
    sheet: dict[str, Any] = {}
    for batch in ev.clips("returns", ev.config.returns):
        frames, actions = batch["frames"], batch["actions"]
        history, latents = int(batch["history_end"][0]), ev.encode(frames)
        picked = batch["return_frames"] - history  # [B, 8] within the generated part
        chunk = ev.loop.chunk_frames
        length = (int(picked.max()) // chunk + 1) * chunk
        rows = torch.arange(len(frames), device=ev.device)[:, None]
        truth = frames[rows, picked + history]
        results = {"bound": ev.decode(latents[:, history:])[rows, picked]}
        for name, method in methods.items():
            rollout = ev.rollout(len(frames), method)
            rollout.prefill(latents[:, :history], actions[:, :history])
            way_back = torch.cat(list(rollout.generate(length, actions[:, history:])), dim=1)
            results[name] = ev.decode(way_back)[rows, picked]
        for name, shown in results.items():
            scores[name] += masked_psnr(shown, truth, batch["return_masks"]).tolist()
        if not sheet:
            sheet = {name: video[:8, -1].cpu().numpy() for name, video in {"truth": truth, **results}.items()}
    gain = paired_difference(scores["dense"], scores["window_16"])
    means = {f"{name}_psnr": interval(values).mean for name, values in scores.items()}
    ev.report("memory", **means, gain=gain.mean, gain_low=gain.low, gain_high=gain.high, returns=gain.n)
    contact_sheet(sheet, scale=2, unit="clip").save(ev.output / "returns.png")


def drift(ev: Evaluation) -> None:
    """Frechet distance of free rollouts to real frames of the same indices: frames 1-90 against 100-190."""
    chunk = ev.loop.chunk_frames
    parts = {
        "early": slice(0, 90),
        "late": slice(100 - chunk, 190 - chunk),
    }  # counted from the first generated frame
    metrics = {name: FrechetDistance().to(ev.device) for name in parts}
    length, frames_a_side = 192, 0
    sheet: dict[str, Any] = {}
    for batch in ev.clips("heldout", -(-ev.config.frechet_frames // 90), frames=length):
        frames, actions = batch["frames"], batch["actions"]
        rollout = ev.rollout(len(frames), first_seed=frames_a_side)
        rollout.prefill(ev.encode(frames[:, :chunk]), actions[:, :chunk])
        latents = torch.cat(list(rollout.generate(length - chunk, actions[:, chunk:])), dim=1)
        generated, real = ev.decode(latents), frames[:, chunk:]
        for name, part in parts.items():
            metrics[name].update(real[:, part], real=True)
            metrics[name].update(generated[:, part], real=False)
        frames_a_side += len(frames) * 90
        if not sheet:
            for clip in range(min(3, len(frames))):
                sheet |= {
                    f"real {clip}": real[clip].cpu().numpy(),
                    f"free {clip}": generated[clip].cpu().numpy(),
                }
    early, late = (float(metrics[name].compute()) for name in parts)
    ev.report("drift", early=early, late=late, ratio=late / early, frames=frames_a_side)
    contact_sheet(sheet, columns=10, first_frame=chunk).save(ev.output / "drift.png")
