"""A clip made from prompts alone, which may change on the way: what experiments/rollout.py runs on scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import Prompts
from fastar.data.scenes.detector import Presence
from fastar.data.scenes.embedding import Encoder
from fastar.data.scenes.storyboard import Prompt, Storyboard, read_storyboard, storyboard_of
from fastar.results import Run
from fastar.rollout.rollout import Rollout

DRAWN_FRAMES = 96  # of a held-out script, unless `frames` says otherwise


@dataclass(frozen=True)
class PromptChange:
    """`prompts` hold from `frame` on; `rewrite` frames before it are cached again under them."""

    frame: int
    rewrite: int
    prompts: Prompts


@dataclass
class PromptedClip:
    """One video of which nothing is given but its prompts, on the CPU.

    Attributes:
        storyboard: the prompts in words.
        encoder: sha256 of what encoded them.
        prompts: the first one.
        changes: the later ones, in order.
        actions: int64 [1, F], the timecode.
        truth: uint8 [1, F, H, W, 3], what the prompts say; None if they say more than can be drawn.
        untold: why there is no truth.
    """

    storyboard: Storyboard
    encoder: str | None
    prompts: Prompts
    changes: Sequence[PromptChange]
    actions: Tensor
    truth: Tensor | None
    untold: str | None = None
    prefill: int = 0
    batch: int = 1

    @property
    def end(self) -> int:
        """Frames of the video."""
        return self.actions.shape[1]

    def actions_in(self, part: slice) -> Tensor:
        """Actions of the frames of `part`."""
        return self.actions[:, part]

    def identity(self) -> dict[str, Any]:
        """What decides the video, as far as the clip does."""
        return {"prompts": self.storyboard.plain(), "encoder": self.encoder}

    def change(self, rollout: Rollout, latents: Sequence[Tensor]) -> None:
        """Change the prompts of a rollout that stands where they change; `latents` are all chunks made so far."""
        first = rollout.next_frame
        for change in (change for change in self.changes if change.frame == first):
            recent = slice(first - change.rewrite, first)
            made = torch.cat(list(latents), dim=1)[:, recent]
            rollout.change_prompts(change.prompts, made, self.actions_in(recent))

    def score(self, run: Run, shown: Tensor) -> None:
        """Log how many of the scripted things are in their places in the video, uint8 [1, F, H, W, 3]."""
        if self.truth is None:
            return
        found = self.storyboard.presence(shown[0].movedim(-1, 1))
        run.log({"presence": found.share})
        if self.changes:
            start = self.changes[0].frame
            later = Presence(found.expected[start:], found.found[start:])
            run.log({"presence/changed": later.share})


def prompted_clip(config: DictConfig, chunk: int) -> PromptedClip:
    """The clip of the prompt file that `config` names, or of the held-out script number `seed`.

    Raises:
        FileNotFoundError, ValueError: settings or a file that make no sense, or words that the encoder does not know.
    """
    if config.data.get("encoder") is None:
        raise ValueError(
            f"the backbone '{config.backbone.name}' reads prompts and data={config.data.name} has no encoder for them: "
            "add data=scenes, or for Wan's text encoder data=prompts"
        )
    if config.actions != "clip" or config.prefill_frames is not None:
        raise ValueError("a video of prompts alone begins with nothing: leave actions and prefill_frames out")
    if config.prompts is None:
        storyboard = _drawn(config, chunk)
    elif config.frames is not None:
        raise ValueError("the prompt file says how many frames there are: leave frames out")
    else:
        storyboard = read_storyboard(config.prompts, chunk=chunk)
    encoder = instantiate(config.data.encoder)
    try:
        first, *later = [_encoded(prompt, encoder) for prompt in storyboard.prompts]
    except ValueError as error:
        source = (
            f"held-out script {config.seed}" if config.prompts is None else f"prompt file {config.prompts}"
        )
        raise ValueError(f"{source}: {error}") from error
    changes = [
        PromptChange(prompt.at, prompt.rewrite, encoded)
        for prompt, encoded in zip(storyboard.prompts[1:], later, strict=True)
    ]
    truth, untold = None, None
    try:
        truth = storyboard.render()[None]
    except ValueError as error:
        untold = str(error)
    return PromptedClip(
        storyboard, encoder.sha256, first, changes, storyboard.timecode()[None], truth, untold
    )


def _drawn(config: DictConfig, chunk: int) -> Storyboard:
    frames = DRAWN_FRAMES if config.frames is None else config.frames
    if frames % chunk:
        raise ValueError(f"frames={frames} must be a whole number of {chunk}-frame chunks")
    dataset = instantiate(config.data.heldout, frames=frames, encoder=None)
    return storyboard_of(dataset.script(config.seed))


def _encoded(prompt: Prompt, encoder: Encoder) -> Prompts:
    embeddings, tokens = prompt.embed(encoder)
    return Prompts(embeddings[None].float(), tokens[None])
