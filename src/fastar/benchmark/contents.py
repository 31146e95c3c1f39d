"""What a benchmark's rollouts commit: recorded walks by a fixed map, or held-out clips, encoded by the backbone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import Prompts
from fastar.compare.clips import check_source, render_clips
from fastar.compare.session import Session
from fastar.data.noise import NoiseClips
from fastar.data.recorded import COEFFICIENTS, Motion, load_motion


@dataclass(frozen=True)
class Contents:
    """One video to commit.

    Attributes:
        motion: its latents.
        actions: int64 [1, F] of its frames, or None: none is pressed.
        prompts: of it, random ones, or None for a backbone that reads none.
        about: where it is from, in words.
    """

    motion: Motion
    actions: Tensor | None
    prompts: Prompts | None
    about: str

    def actions_of(self, first_frame: int, frames: int) -> Tensor | None:
        """int64 [1, frames] from latent frame `first_frame` on."""
        return None if self.actions is None else self.actions[:, first_frame : first_frame + frames]


def contents_of(
    config: DictConfig, session: Session, device: torch.device, latent_frames: int | None
) -> Contents:
    """The held-out clips of `config.data`, or the recording of `config.motion` where that names none.

    Args:
        latent_frames: that are wanted, at least; None: all of the recording.

    Raises:
        ValueError: no recording or one that is too short, or a backbone that does not fit.
    """
    if config.get("data") is not None:
        frames = session.backbone.config.context_frames if latent_frames is None else latent_frames
        return _heldout(config, session, frames)
    if session.backbone.config.transformer.out_channels != len(COEFFICIENTS):
        raise ValueError(
            f"the backbone '{session.backbone.config.name}' cannot commit the recording: its latents must "
            f"have {len(COEFFICIENTS)} channels; give it clips of its own, as in data=doom"
        )
    motion = load_motion(config.motion.folder, tuple(config.backbone.frame_size), device, latent_frames)
    if latent_frames is not None:
        motion.chunk(0, latent_frames, torch.device("cpu"))  # a recording that is too short says so now
    return Contents(motion, None, random_prompts(session, config.seed), "recorded walks")


def _heldout(config: DictConfig, session: Session, latent_frames: int) -> Contents:
    """Held-out clips one after the other, each as long as the backbone's context, encoded; the first one's prompt."""
    check_source(config.data, "heldout", session.backbone.config)
    length = session.backbone.config.context_frames
    number = -(-latent_frames // length)
    clips = render_clips(config.data, "heldout", range(number), prefill=length, generated=0)
    sums, shown = hashlib.sha256(), set()
    for frame in clips.frames.flatten(0, 1):
        shown.add(hashlib.sha256(frame.numpy().tobytes()).digest())
        sums.update(frame.numpy().tobytes())
    latents = torch.cat([session.encode(clips.frames[i : i + 1])[0].cpu() for i in range(number)])
    prompts = (
        None if clips.prompts is None else Prompts(clips.prompts.embeddings[:1], clips.prompts.lengths[:1])
    )
    return Contents(
        Motion(latents.half(), len(shown) / (number * length), sums.hexdigest()),
        clips.actions.flatten()[None],
        prompts,
        f"{number} held-out clip{'s' if number > 1 else ''}",
    )


def random_prompts(session: Session, seed: int) -> Prompts | None:
    """One prompt of random embeddings, for a backbone that reads any."""
    config = session.backbone.config
    if config.transformer.text_dim is None:
        return None
    clips = NoiseClips(
        channels=config.transformer.out_channels,
        frame_size=config.frame_size,
        text_dim=config.transformer.text_dim,
        text_len=config.transformer.text_len,
        seed=seed,
    )
    clip = clips.clip(0, history=1, future=0)
    return Prompts(clip["prompt"][None], clip["prompt_tokens"][None])
