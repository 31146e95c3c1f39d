"""Frames of a script, and where everything is in them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.script import HEIGHT, MOST_ACTORS, PANS, WIDTH, Background, Script, Shot
from fastar.data.scenes.sprites import SIZES, boxes, masks, sprites

PALETTE = {
    "red": (196, 88, 84),
    "orange": (222, 150, 84),
    "yellow": (226, 206, 116),
    "green": (122, 172, 112),
    "blue": (104, 146, 196),
    "purple": (152, 122, 184),
    "brown": (138, 108, 88),
    "gray": (160, 164, 170),
}

_FLOOR = 72  # first row of the floor of a plain wall
_BAND = 12  # pixels: stripes and waves
_CHECK = 16
_DOT, _DOT_RADIUS = 24, 7
_WAVE, _WAVE_HEIGHT = 32, 4
_MARGIN = max(SIZES.values())  # around the frame: sprites that leave are cut there
_CANVAS_H, _CANVAS_W = HEIGHT + 2 * _MARGIN, WIDTH + 2 * _MARGIN


@dataclass(frozen=True)
class Truth:
    """What a script shows. Actors are in the order of mention; rows of those that a shot lacks are zero, nouns -1.

    boxes:   float32 [F, 3, 4], x0, y0, x1, y1 in pixels, x1 and y1 exclusive; may lie outside of the frame.
    visible: float32 [F, 3], share of the sprite's pixels that are in the frame and not behind a later actor.
    nouns:   int64 [F, 3], number in NOUNS.
    shot, phase: int64 [F], number of the shot and frames since its cut.
    """

    boxes: Tensor
    visible: Tensor
    nouns: Tensor
    shot: Tensor
    phase: Tensor


def render(script: Script, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [F, 96, 128, 3], RGB. In whole numbers throughout: the same bits on every device."""
    return torch.cat([_render_shot(shot, torch.device(device)) for shot in script.shots])


def truth(script: Script) -> Truth:
    """Boxes, visible shares and timecode of every frame, from the script alone."""
    frames = script.frames
    found = Truth(
        boxes=torch.zeros(frames, MOST_ACTORS, 4),
        visible=torch.zeros(frames, MOST_ACTORS),
        nouns=torch.full((frames, MOST_ACTORS), -1),
        shot=torch.tensor([shot for shot, _ in script.timecode()]),
        phase=torch.tensor([phase for _, phase in script.timecode()]),
    )
    start = 0
    for shot in script.shots:
        frames_of_shot = slice(start, start + shot.length)
        owner = torch.full((shot.length, _CANVAS_H, _CANVAS_W), -1)
        flat = owner.view(shot.length, -1)
        for number, actor in enumerate(shot.actors):
            noun = NOUNS.index(actor.noun)
            frame, pixels = _pixels(shot, number, torch.device("cpu"))
            flat[frame, pixels] = flat[frame, pixels].masked_fill(masks(actor.size)[noun].flatten(), number)
            corners = _corners(shot, number, torch.device("cpu")).repeat(1, 2)
            found.boxes[frames_of_shot, number] = (corners + boxes(actor.size)[noun]).float()
            found.nouns[frames_of_shot, number] = noun
        for number, actor in enumerate(shot.actors):
            pixels_of_noun = masks(actor.size)[NOUNS.index(actor.noun)].sum()
            seen = (_inner(owner) == number).sum((1, 2))
            found.visible[frames_of_shot, number] = seen / pixels_of_noun
        start += shot.length
    return found


def _render_shot(shot: Shot, device: torch.device) -> Tensor:
    canvas = torch.zeros(shot.length, _CANVAS_H, _CANVAS_W, 3, dtype=torch.uint8, device=device)
    _inner(canvas).copy_(_backdrops(shot, device))
    flat = canvas.view(shot.length, -1, 3)
    for number, actor in enumerate(shot.actors):
        sprite = sprites(actor.size)[NOUNS.index(actor.noun)].to(device).int().view(-1, 4)
        colour, alpha = sprite[:, :3], sprite[:, 3:]
        frame, pixels = _pixels(shot, number, device)
        behind = flat[frame, pixels].int()
        flat[frame, pixels] = ((alpha * colour + (255 - alpha) * behind + 127) // 255).to(torch.uint8)
    return _inner(canvas).contiguous()


def _inner(canvas: Tensor) -> Tensor:
    return canvas[:, _MARGIN : _MARGIN + HEIGHT, _MARGIN : _MARGIN + WIDTH]


def _corners(shot: Shot, actor: int, device: torch.device) -> Tensor:
    """int64 [L, 2]: x, y of the top left pixel of the actor's cell in each frame of the shot."""
    corners = [shot.actors[actor].corner(phase, shot.camera) for phase in range(shot.length)]
    return torch.tensor(corners, device=device)


def _pixels(shot: Shot, actor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frames [L, 1] and pixels of the flat canvas [L, S * S] that the actor's cell covers."""
    side = SIZES[shot.actors[actor].size]
    corners = _corners(shot, actor, device)
    left = corners[:, 0].clamp(-side, WIDTH) + _MARGIN
    top = corners[:, 1].clamp(-side, HEIGHT) + _MARGIN
    steps = torch.arange(side, device=device)
    within = (steps[:, None] * _CANVAS_W + steps).flatten()
    frame = torch.arange(shot.length, device=device)[:, None]
    return frame, (top * _CANVAS_W + left)[:, None] + within


def _backdrops(shot: Shot, device: torch.device) -> Tensor:
    """uint8 [L, 96, 128, 3]: one strip as wide as the camera sees in the shot, and a window that moves over it."""
    pan, way = PANS[shot.camera], shot.length - 1
    strip = _backdrop(shot.background, min(0, pan * way), WIDTH + abs(pan) * way, device)
    windows = strip.unfold(1, WIDTH, 1).permute(1, 0, 3, 2)
    if pan == 0:
        return windows.expand(shot.length, -1, -1, -1)
    return windows if pan > 0 else windows.flip(0)


def _backdrop(background: Background, left: int, width: int, device: torch.device) -> Tensor:
    """uint8 [96, width, 3]: the background from column `left` on."""
    y = torch.arange(HEIGHT, device=device)[:, None]
    x = torch.arange(left, left + width, device=device)[None]
    match background.pattern:
        case "plain":
            second = y >= _FLOOR
        case "level stripes":
            second = y // _BAND % 2 == 1
        case "upright stripes":
            second = x // _BAND % 2 == 1
        case "checks":
            second = (x // _CHECK + y // _CHECK) % 2 == 1
        case "dots":
            dx, dy = x % _DOT - _DOT // 2, y % _DOT - _DOT // 2
            second = dx * dx + dy * dy <= _DOT_RADIUS**2
        case "waves":
            period = [round(_WAVE_HEIGHT * math.sin(2 * math.pi * i / _WAVE)) for i in range(_WAVE)]
            second = (y + torch.tensor(period, device=device)[x % _WAVE]) // _BAND % 2 == 1
        case _:
            raise ValueError(f"no such pattern: '{background.pattern}'.")
    colours = torch.tensor([PALETTE[name] for name in background.colours], dtype=torch.uint8, device=device)
    return colours[second.expand(HEIGHT, width).long()]
