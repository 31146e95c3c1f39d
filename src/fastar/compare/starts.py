"""What videos start from on a backbone that reads an image: its first frame, and the image encoder's tokens of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import BackboneConfig
from fastar.backbones.wan.clip import ImageEncoder
from fastar.data.video import read_start


@dataclass(frozen=True)
class ImageStart:
    """Of a batch of B videos, on the CPU.

    Attributes:
        frames: uint8 [B, 1, H, W, 3], each video's first frame at the backbone's size.
        tokens: [B, S, image_dim], what the image encoder makes of them.
    """

    frames: Tensor
    tokens: Tensor


def image_encoder_of(data: DictConfig, backbone: DictConfig) -> ImageEncoder | None:
    """The image encoder that a node of conf/data names, for a backbone (of conf/backbone) that reads an image.

    Raises:
        FileNotFoundError, ValueError: there is none, or the data have no images.
    """
    if backbone.transformer.get("image_dim") is None:
        return None
    if data.get("image_encoder") is None:
        raise ValueError(
            f"the backbone '{backbone.name}' starts from an image and data={data.name} has none: use data=image, or "
            "data=prompts if it reads prompts, too"
        )
    encoder = instantiate(data.image_encoder)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def image_start(files: Sequence[Path], encoder: ImageEncoder, backbone: BackboneConfig) -> ImageStart:
    """Starts from image files, or from the first frames of videos, whose tokens are read or made now.

    Raises:
        ValueError: a file that is neither, an encoder that does not fit the backbone, or is damaged.
    """
    height, width = backbone.frame_size
    frames = torch.stack([read_start(file, height=height, width=width)[:1] for file in files])
    tokens = encoder.encode(frames[:, 0])
    if tokens.shape[-1] != backbone.transformer.image_dim:
        raise ValueError(
            f"{encoder.found.files[0]} makes tokens {tokens.shape[-1]} wide and the backbone '{backbone.name}' reads "
            f"{backbone.transformer.image_dim}: give the image encoder that it was trained with"
        )
    return ImageStart(frames, tokens)
