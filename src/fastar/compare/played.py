"""A video that starts from an image and follows mouse and keyboard: Matrix-Game 2.0 in experiments/rollout.py."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import BackboneConfig
from fastar.backbones.codec import pixel_frames
from fastar.backbones.wan.actions import action_windows
from fastar.compare.starts import ImageStart, image_encoder_of, image_start
from fastar.data.controls import read_controls

DEFAULT = "clip"
"""`actions` of conf/rollout.yaml: of a held-out clip, which there is none of here."""


@dataclass
class PlayedClip:
    """One video of which an image and all actions are given, on the CPU; there is no truth about it.

    Attributes:
        start: the image.
        images: sha256 of what encoded it.
        actions: [1, F, W, mouse_dim + keyboard_dim], windows of the frames (`action_windows`).
        end: latent frames of the video.
    """

    start: ImageStart
    images: str
    actions: Tensor
    end: int
    prefill: int = 0
    prompts: None = None
    truth: None = None
    batch: int = 1

    def actions_in(self, part: slice) -> Tensor:
        """Actions of the frames of `part`."""
        return self.actions[:, part]

    def identity(self) -> dict[str, Any]:
        """What decides the video, as far as the clip does: picture and actions, not the files that they came in."""
        given = {"image": self.start.frames, "actions": self.actions.contiguous()}
        sums = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in given.items()}
        return {**sums, "image_encoder": self.images, "frames": self.end}


def played_clip(config: DictConfig, backbone: BackboneConfig) -> PlayedClip:
    """The clip of `config.image` and `config.actions`.

    Raises:
        FileNotFoundError, ValueError: settings that make no sense together, or files that are missing or ill-formed.
    """
    module = backbone.transformer.action_module
    assert module is not None
    if config.image is None or not Path(config.image).is_file():
        raise ValueError(
            f"the backbone '{backbone.name}' starts from an image: name its file with image=FILE"
            + ("" if config.image is None else f", there is none at {config.image}")
        )
    if config.actions == DEFAULT:
        raise ValueError(
            "say what is pressed: actions=random, held keys such as actions=forward*24, or a .csv or .json file"
        )
    frames = backbone.context_frames if config.frames is None else config.frames
    if frames < 1 or frames % backbone.chunk_frames or config.prefill_frames:
        raise ValueError(
            f"frames={frames} must be a whole number of {backbone.chunk_frames}-frame chunks, and prefill_frames left "
            "out: the image is all that is given"
        )
    keyboard, mouse = read_controls(
        str(config.actions),
        keyboard_dim=module.keyboard_dim,
        mouse_dim=module.mouse_dim,
        frames=pixel_frames(frames, module.pixel_frames),
        seed=config.seed,
    )
    encoder = image_encoder_of(config.data, config.backbone)
    assert encoder is not None
    windows = action_windows(
        module, keyboard=keyboard[None], mouse=None if mouse is None else mouse[None], num_frames=frames
    )
    return PlayedClip(image_start([Path(config.image)], encoder, backbone), encoder.sha256, windows, frames)
