"""Finds the sprites in frames by their looks: no training, only correlation with what the renderer draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.render import truth
from fastar.data.scenes.script import HEIGHT, WIDTH, Script
from fastar.data.scenes.sprites import SIZES, sprites

LEAST_SCORE = 0.6
"""A sprite counts as found from this correlation on."""
LEAST_SHOWN = 0.5
"""Visible share from which on an actor has to be found; also the share of a sprite in the frame that can be scored."""

_NEAR = 2  # pixels around the best place of the right noun in which the other nouns may do better
_BATCH = 64  # crops at once


@dataclass(frozen=True)
class Presence:
    """Actors that a script shows and a video has, frame by frame: bool [F, 3], in the order of mention."""

    expected: Tensor
    found: Tensor

    @property
    def share(self) -> float:
        """Found of those expected; 0 if none is."""
        return self.share_from(0)

    def share_from(self, first: int) -> float:
        """The same of the frames from number `first` on."""
        found, expected = self.found[first:], self.expected[first:]
        return (found & expected).sum().item() / max(1, expected.sum().item())


def detect(frames: Tensor, nouns: Sequence[str] = NOUNS, sizes: Sequence[str] = tuple(SIZES)) -> Tensor:
    """Scores of every noun at every place.

    Args:
        frames: uint8 [N, 3, 96, 128], RGB.

    Returns:
        float32 [N, nouns, sizes, 96, 128] in [-1, 1]: correlation with the sprite whose cell is centred on this pixel
        (`correlate`).
    """
    numbers = [NOUNS.index(noun) for noun in nouns]
    every = torch.arange(len(frames))
    scores = []
    for size in sizes:
        side = SIZES[size]
        corner = torch.full_like(every, -(side // 2))
        templates = _templates(size, frames.device)[None, numbers]
        # frame by frame: the spectra of 64 nouns are large
        found = [
            correlate(*_crop(frames, i, corner[i], corner[i], HEIGHT + side - 1, WIDTH + side - 1), templates)
            for i in every.split(1)
        ]
        scores.append(torch.cat(found))
    return torch.stack(scores, dim=2)


def presence(frames: Tensor, script: Script) -> Presence:
    """Whether the things of a script are where it says.

    An actor is expected in every frame that shows at least `LEAST_SHOWN` of it. It is found if, at the place within
    a sprite's width of the true one where its own noun scores best, that score is at least `LEAST_SCORE` and no other
    noun of the 64 scores better there.

    Args:
        frames: uint8 [F, 3, 96, 128], RGB, on any device; as many as the script has.

    Raises:
        ValueError: another number of frames.
    """
    if len(frames) != script.frames:
        raise ValueError(f"the script has {script.frames} frames, the video {len(frames)}.")
    expected = truth(script).visible >= LEAST_SHOWN
    found = torch.zeros_like(expected)
    for size in SIZES:
        asked = [
            (frame, number, NOUNS.index(actor.noun), *actor.corner(phase, script.shots[shot].camera))
            for frame, (shot, phase) in enumerate(script.timecode())
            for number, actor in enumerate(script.shots[shot].actors)
            if actor.size == size and expected[frame, number]
        ]
        for start in range(0, len(asked), _BATCH):
            frame, number, noun, left, top = torch.tensor(asked[start : start + _BATCH]).unbind(1)
            found[frame, number] = _is_there(frames, frame, noun, left, top, size).cpu()
    return Presence(expected, found)


def _is_there(frames: Tensor, frame: Tensor, noun: Tensor, left: Tensor, top: Tensor, size: str) -> Tensor:
    """bool [K]: whether the noun is in that frame with its cell's corner near (left, top)."""
    side = SIZES[size]
    templates = _templates(size, frames.device)
    own = templates[noun.to(frames.device), None]
    near = correlate(*_crop(frames, frame, top - side, left - side, 3 * side, 3 * side), own)
    best = near.flatten(1).argmax(1).cpu()
    top, left = top - side + best // near.shape[-1], left - side + best % near.shape[-1]
    window = side + 2 * _NEAR
    scores = correlate(*_crop(frames, frame, top - _NEAR, left - _NEAR, window, window), templates[None])
    score, winner = scores.flatten(2).amax(2).max(1)
    return (winner == noun.to(winner.device)) & (score >= LEAST_SCORE)


def _crop(
    frames: Tensor, frame: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Windows of frames, which may lie outside of them: colours in [0, 1] [K, 3, h, w], and 1 inside [K, 1, h, w]."""
    y = (top[:, None] + torch.arange(height)).to(frames.device)
    x = (left[:, None] + torch.arange(width)).to(frames.device)
    inside = ((y >= 0) & (y < HEIGHT))[:, :, None] & ((x >= 0) & (x < WIDTH))[:, None, :]
    y, x = y.clamp(0, HEIGHT - 1)[:, :, None], x.clamp(0, WIDTH - 1)[:, None, :]
    seen = inside[:, None].float()
    windows = frames[frame.to(frames.device)[:, None, None], :, y, x].permute(0, 3, 1, 2)
    return windows.float() / 255 * seen, seen


def _templates(size: str, device: torch.device) -> Tensor:
    """float32 [64, 4, S, S]: colours and alpha in [0, 1]."""
    return sprites(size).to(device).permute(0, 3, 1, 2).float() / 255


def correlate(images: Tensor, inside: Tensor, templates: Tensor) -> Tensor:
    """Normalised cross-correlation of sprites and images, weighted by the sprite's alpha.

    Colours count: one mean is taken off over all pixels and channels together. Pixels outside of the frame have no
    weight; where more than half of a sprite is there, its score is 0.

    Args:
        images: float32 [N, 3, h, w] in [0, 1].
        inside: float32 [N, 1, h, w], 1 in the frame and 0 outside, where images are 0, too.
        templates: float32 [N or 1, M, 4, S, S], colours and alpha in [0, 1].

    Returns:
        float32 [N, M, h - S + 1, w - S + 1] for the top left pixel of the sprite's cell.
    """
    height, width = images.shape[-2:]
    side = templates.shape[-1]
    colour, alpha = templates[:, :, :3], templates[:, :, 3:]
    size = (height, width)

    def spectrum(x: Tensor) -> Tensor:
        return torch.fft.rfft2(x, s=size)

    def correlation(image: Tensor, template: Tensor) -> Tensor:
        product = (image[:, None] * template.conj()).sum(2)
        return torch.fft.irfft2(product, s=size)[..., : height - side + 1, : width - side + 1]

    weight = spectrum(alpha)
    image, seen = spectrum(images), spectrum(inside)
    both = correlation(image, spectrum(alpha * colour))
    image_sum = correlation(image.sum(1, keepdim=True), weight)
    image_square = correlation(spectrum(images.square().sum(1, keepdim=True)), weight)
    count = 3 * correlation(seen, weight)
    colour_sum = correlation(seen, spectrum((alpha * colour).sum(2, keepdim=True)))
    colour_square = correlation(seen, spectrum((alpha * colour.square()).sum(2, keepdim=True)))

    total = 3 * alpha.sum((2, 3, 4))[..., None, None]
    some = count.clamp(min=1)
    # a flat image has no looks: at least the contrast of one grey level
    image_variance = (image_square - image_sum.square() / some).clamp(min=1e-4 * some)
    colour_variance = (colour_square - colour_sum.square() / some).clamp(min=1e-4 * some)
    score = (both - image_sum * colour_sum / some) / (image_variance * colour_variance).sqrt()
    return score.clamp(-1, 1).where(count >= 0.5 * LEAST_SHOWN * total, 0)
