"""The measures of a text-to-video model of scripted scenes: are the things of the prompt where and when it says?

A clip's number is the share of its actor-frames (an actor in a frame that should show at least half of it) in which
`fastar.data.scenes.detector.presence` finds the actor.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from torch import Tensor

from fastar.compare.clips import prompts_of
from fastar.compare.evaluation_base import Batch, Evaluation
from fastar.data.scenes.dataset import ScenesClips
from fastar.data.scenes.detector import Presence, presence
from fastar.data.scenes.script import Script
from fastar.data.video import contact_sheet, save_png
from fastar.metrics.bootstrap import interval
from fastar.metrics.fidelity import frame_psnr

Sheet = dict[int, dict[str, Tensor]]
"""Number of a clip -> label -> video."""

SHEET_CLIPS, SHUFFLED_SHEET_CLIPS, SHEET_FRAMES = 4, 2, 12


def presence_of_things(ev: Evaluation) -> None:
    """Videos from held-out prompts, without a true frame. Beside them what the detector says of the script's render, of
    the autoencoder's picture of it, and of the generated video with the script of the next clip."""
    scripts = _scripts(ev)
    shares: dict[str, list[float]] = defaultdict(list)
    psnr: list[float] = []
    found: list[dict[str, Any]] = []
    sheet: Sheet = {}
    for batch in ev.clips("heldout", ev.config.clips):
        frames = batch["frames"]
        generated = _generate(ev, batch, batch)
        videos = {"real": frames, "autoencoder": ev.decode(ev.encode(frames)), "generated": generated}
        psnr += frame_psnr(generated, frames).mean(dim=1).tolist()
        for i, number in enumerate(batch["index"].tolist()):
            script = scripts.script(number)
            seen = {name: _presence(video[i], script) for name, video in videos.items()}
            for name, scored in seen.items():
                shares[name].append(scored.share)
            shares["other_script"].append(_presence(generated[i], scripts.script(number + 1)).share)
            found += _actor_frames(seen["generated"], script)
            if number < SHEET_CLIPS:
                sheet[number] = {f"script {number}": frames[i], f"model {number}": generated[i]}
    report = interval(shares.pop("generated"))
    table = pd.DataFrame(found)
    by = {
        f"by_{kind}": table.groupby(kind)["found"].mean().to_dict() for kind in ("actors", "motion", "size")
    }
    ev.report(
        "presence",
        share=report.mean,
        low=report.low,
        high=report.high,
        **{name: interval(values).mean for name, values in shares.items()},
        psnr=interval(psnr).mean,
        clips=report.n,
        actor_frames=len(table),
        **by,
    )
    _save_sheet(ev, "presence.png", sheet)


def presence_with_shuffled_prompts(ev: Evaluation) -> None:
    """The control: each clip's own timecode with the prompt of the next one, scored with the clip's own script."""
    scripts = _scripts(ev)
    shares: list[float] = []
    psnr: list[float] = []
    sheet: Sheet = {}
    for batch, following in _pairs(ev, scripts.first_index):
        generated = _generate(ev, batch, following)
        psnr += frame_psnr(generated, batch["frames"]).mean(dim=1).tolist()
        for i, number in enumerate(batch["index"].tolist()):
            shares.append(_presence(generated[i], scripts.script(number)).share)
            if number < SHUFFLED_SHEET_CLIPS:
                label = f"model, prompt {number + 1}"
                sheet[number] = {f"script {number}": batch["frames"][i], label: generated[i]}
    report = interval(shares)
    ev.report(
        "shuffled",
        share=report.mean,
        low=report.low,
        high=report.high,
        psnr=interval(psnr).mean,
        clips=report.n,
    )
    _save_sheet(ev, "shuffled.png", sheet)


def _scripts(ev: Evaluation) -> ScenesClips:
    """The held-out clips without their prompts, for their scripts."""
    clips: ScenesClips = instantiate(ev.config.data.heldout, encoder=None)
    return clips


def _pairs(ev: Evaluation, first: int) -> Iterator[tuple[Batch, Batch]]:
    """Batches of clips, and of the clips one number later, in the same order."""
    count = ev.config.clips
    both = (ev.clips("heldout", count, first_index=first + later) for later in (0, 1))
    for batch, following in zip(*both, strict=True):
        if not (following["index"] == batch["index"] + 1).all():
            raise RuntimeError("the loader gave the clips of a shuffled prompt in another order")
        yield batch, following


def _generate(ev: Evaluation, clips: Batch, told: Batch) -> Tensor:
    """Videos uint8 [B, F, H, W, 3] from nothing: timecode and noise of `clips`, prompts of `told`."""
    rollout = ev.rollout(clips["index"].tolist(), prompts=prompts_of(told))
    chunks = rollout.generate(clips["actions"].shape[1], clips["actions"])
    return ev.decode(torch.cat(list(chunks), dim=1))


def _presence(video: Tensor, script: Script) -> Presence:
    return presence(video.permute(0, 3, 1, 2), script)


def _actor_frames(scored: Presence, script: Script) -> list[dict[str, Any]]:
    """One row for every actor in every frame where it is expected: whether it was found, and what it is."""
    rows = []
    for frame, (number, _) in enumerate(script.timecode()):
        actors = script.shots[number].actors
        for i, actor in enumerate(actors):
            if scored.expected[frame, i]:
                about = {
                    "actors": f"{len(actors)} in a shot",
                    "motion": str(actor.motion),
                    "size": actor.size,
                }
                rows.append({"found": bool(scored.found[frame, i]), **about})
    return rows


def _save_sheet(ev: Evaluation, name: str, sheet: Sheet) -> None:
    """Rows in the order of their clips, whatever order the loader's workers had."""
    rows = {label: video for number in sorted(sheet) for label, video in sheet[number].items()}
    save_png(ev.output / name, contact_sheet(rows, columns=SHEET_FRAMES))
