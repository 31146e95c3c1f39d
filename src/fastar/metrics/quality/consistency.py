"""Do frames keep looking alike? Cosines of image features to the first and to the previous frame."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastar.metrics.frechet import EfficientNetLite0
from fastar.metrics.quality.base import VideoScore


class _Consistency(VideoScore):
    """Mean over frames 2 to F of (cosine to the previous frame + cosine to the first) / 2, negative ones as 0.

    VBench's formula for both of its consistencies (Huang et al. 2024). It is blind to what happens: a frozen
    video scores 1.

    Args:
        features: module [N, 3, H, W] in [0, 1] -> [N, D].
        batch: frames per forward of the features; few, since their maps then stay in a CPU's cache.
    """

    least = 2

    def __init__(self, features: nn.Module, *, batch: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features, self.batch = features, batch

    def observe(self, video: Tensor) -> Tensor:
        """Features of each frame, of length 1: [F, D]."""
        found = [self.features(part.to(self.device)) for part in video.split(self.batch)]
        return functional.normalize(torch.cat(found), dim=-1)

    def judge(self, seen: Tensor) -> Tensor:
        previous = (seen[1:] * seen[:-1]).sum(dim=-1)
        first = seen[1:] @ seen[0]
        return (previous.clamp(min=0) + first.clamp(min=0)).mean() / 2


class SubjectConsistency(_Consistency):
    """`_Consistency` of what is seen: the last features of EfficientNet-Lite0, where VBench has DINO's.

    Both know what things are; DINO separates a subject from what is around it better. Blur makes frames more alike.
    """

    def __init__(self, features: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(EfficientNetLite0() if features is None else features, **kwargs)


class BackgroundConsistency(_Consistency):
    """`_Consistency` of textures and colours: a map from the middle of EfficientNet-Lite0, averaged over the frame.

    VBench has CLIP's features of the frame. The map's average tells materials apart rather than things, wherever they
    are: it changes little when the camera turns in a room, and much when the walls change. Blur makes frames more
    alike, and so may noise that all of them have.
    """

    def __init__(self, features: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(EfficientNetLite0(middle=True) if features is None else features, **kwargs)
