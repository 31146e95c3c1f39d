"""Videos that start from an image and follow mouse and keyboard: those of Matrix-Game 2.0."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import BackboneConfig
from fastar.backbones.codec import pixel_frames
from fastar.backbones.storage import sha256_of
from fastar.backbones.wan.actions import action_windows
from fastar.compare.starts import ImageStart, image_encoder_of, image_start
from fastar.data.controls import read_controls

PLAYED = "image"
"""`source` of conf/compare.yaml."""

DEFAULT = "clip"
"""`actions` of conf/rollout.yaml: of a held-out clip, which there is none of here."""


@dataclass
class PlayedClip:
    """A batch of B videos of which an image and all actions are given, on the CPU; there is no truth about them.

    Attributes:
        start: the image.
        images: sha256 of what encoded it.
        actions: [B, F, W, mouse_dim + keyboard_dim], windows of the frames (`action_windows`).
        end: latent frames of the videos.
    """

    start: ImageStart
    images: str
    actions: Tensor
    end: int
    prefill: int = 0
    prompts: None = None
    truth: None = None

    @property
    def batch(self) -> int:
        return len(self.actions)

    def actions_in(self, part: slice) -> Tensor:
        """Actions of the frames of `part`."""
        return self.actions[:, part]

    def identity(self) -> dict[str, Any]:
        """What decides the videos, as far as the clip does: picture and actions, not the files that they came in."""
        given = {"image": self.start.frames, "actions": self.actions.contiguous()}
        sums = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in given.items()}
        return {**sums, "image_encoder": self.images, "frames": self.end}


def played_clip(config: DictConfig, backbone: BackboneConfig, seeds: Sequence[int]) -> PlayedClip:
    """Clips of `config.image` and `config.actions`, one a seed, which random actions are drawn from.

    Raises:
        FileNotFoundError, ValueError: settings that make no sense together, or files that are missing or ill-formed.
    """
    module, path = backbone.transformer.action_module, _image_of(config)
    assert module is not None
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
    told = [
        read_controls(
            str(config.actions),
            keyboard_dim=module.keyboard_dim,
            mouse_dim=module.mouse_dim,
            frames=pixel_frames(frames, module.pixel_frames),
            seed=seed,
        )
        for seed in seeds
    ]
    encoder = image_encoder_of(config.data, config.backbone)
    assert encoder is not None
    moves = [mouse for _, mouse in told if mouse is not None]
    windows = action_windows(
        module,
        keyboard=torch.stack([keyboard for keyboard, _ in told]),
        mouse=torch.stack(moves) if moves else None,
        num_frames=frames,
    )
    return PlayedClip(image_start([path] * len(told), encoder, backbone), encoder.sha256, windows, frames)


def played_identity(config: DictConfig) -> dict[str, Any]:
    """What decides the clips of seeds, before they are made: image and actions, not where their files lie.

    Raises:
        FileNotFoundError, ValueError: there is no image, or no encoder of images.
    """
    encoder, actions = image_encoder_of(config.data, config.backbone), Path(str(config.actions))
    assert encoder is not None
    return {
        "image": sha256_of(_image_of(config))[:16],
        "actions": sha256_of(actions)[:16] if actions.is_file() else str(config.actions),
        "image_encoder": encoder.sha256[:16],
    }


def _image_of(config: DictConfig) -> Path:
    if config.image is None or not Path(config.image).is_file():
        raise ValueError(
            f"the backbone '{config.backbone.name}' starts from an image: name its file with image=FILE"
            + ("" if config.image is None else f", there is none at {config.image}")
        )
    return Path(config.image)
