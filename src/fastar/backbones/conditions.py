"""What a backbone that starts from an image knows of it: tokens to attend to, and latents beside the noisy ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.backbones.wan.config import WanConfig

MASK_CHANNELS = 4  # one for each pixel frame of a latent frame


@dataclass(frozen=True)
class ImageCondition:
    """The images that a batch of videos starts from, one each.

    Attributes:
        tokens: [B, S, image_dim] of the image encoder (CLIP ViT-H's second last layer: 257, 1280 wide).
        latents: [B, F, condition_channels, h, w] of the video's frames: where they are known, and what is known.
    """

    tokens: Tensor
    latents: Tensor

    @classmethod
    def of_first_frame(cls, tokens: Tensor, latents: Tensor) -> ImageCondition:
        """Of a video whose first frame is known: `latents` [B, F, C, h, w] are of the image and blank frames after it.

        As Wan I2V and Matrix-Game 2.0 have it, a mask's four channels come first: 1 in latent frame 0, 0 in the others.
        """
        mask = torch.zeros_like(latents[:, :, :1]).repeat(1, 1, MASK_CHANNELS, 1, 1)
        mask[:, 0] = 1
        return cls(tokens, torch.cat([mask, latents], dim=2))

    def known(self, first_frame: int, num_frames: int) -> Tensor:
        """Of these frames: [B, num_frames, condition_channels, h, w].

        Raises:
            ValueError: they go on behind the last one.
        """
        last = first_frame + num_frames
        if last > self.latents.shape[1]:
            raise ValueError(
                f"the image condition is of {self.latents.shape[1]} frames and frames {first_frame} to {last - 1} are "
                "asked for: encode the image with as many blank frames as the video shall have"
            )
        return self.latents[:, first_frame:last]


def check_image(
    image: ImageCondition | None, config: WanConfig, batch: int, latent_shape: Sequence[int]
) -> None:
    """Raise a ValueError unless `image` is what a backbone of `config` needs for so many videos of this shape."""
    wanted = config.image_dim is not None
    if wanted != (image is not None):
        raise ValueError(
            f"this backbone starts from an image and none was given: pass an ImageCondition of {batch} videos"
            if wanted
            else "this backbone reads no image: leave it out"
        )
    if image is None:
        return
    tokens = (batch, image.tokens.shape[1], config.image_dim)
    latents = (batch, image.latents.shape[1], config.condition_channels, *latent_shape[1:])
    if image.tokens.shape != tokens or image.latents.shape != latents:
        raise ValueError(
            f"an image condition must be tokens [{batch}, S, {config.image_dim}] and latents {list(latents)}, got "
            f"{list(image.tokens.shape)} and {list(image.latents.shape)}"
        )
