"""The measures of a Doom world model: what it draws next, does on command, remembers, and how it wears out."""

from typing import Any

import torch

from fastar.cache import EmptyCache, WindowCache
from fastar.compare.evaluation_base import Evaluation
from fastar.data.doom.camera import Action
from fastar.data.video import contact_sheet, save_png
from fastar.metrics.bootstrap import interval, paired_difference
from fastar.metrics.fidelity import frame_psnr
from fastar.metrics.flow import LEFT, RIGHT, TurnAgreement
from fastar.metrics.frechet import FrechetDistance
from fastar.metrics.revisit import masked_psnr
from fastar.rollout.method import Method


def next_frame_psnr(ev: Evaluation) -> None:
    """First frame after true history, where the camera moves; beside it, copying the last true frame."""
    chunk, history = ev.loop.chunk_frames, ev.backbone.config.context_frames
    rows: dict[str, list[float]] = {"model": [], "copy": [], "bound": [], "chunk": []}
    for batch in ev.clips("heldout", ev.config.clips, frames=history + chunk):
        frames, actions = batch["frames"], batch["actions"]
        latents = ev.encode(frames)
        rollout = ev.rollout(range(len(frames)))
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
            rollout = ev.rollout(range(tries, tries + len(latents)))
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
            rollout = ev.rollout(range(len(frames)), method)
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
    save_png(ev.output / "returns.png", contact_sheet(sheet, scale=2, unit="clip"))


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
        rollout = ev.rollout(range(frames_a_side, frames_a_side + len(frames)))
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
    save_png(ev.output / "drift.png", contact_sheet(sheet, columns=10, first_frame=chunk))
