"""Scripts of scenes: what each shot shows, and a script drawn for every clip number."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeVar

import numpy as np

from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.sprites import SIZES

HEIGHT, WIDTH = 96, 128
LENGTHS = (12, 16, 20, 24)  # frames of a shot
MOST_SHOTS, MOST_ACTORS = 8, 3  # of a video, of a shot
CENTRES_X, CENTRES_Y = (22, 64, 106), (20, 48, 76)  # pixels: columns and rows of the grid of places
PATTERNS = ("plain", "level stripes", "upright stripes", "checks", "dots", "waves")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "gray")

T = TypeVar("T")
Split = Literal["train", "heldout"]
Place = tuple[int, int]  # row and column of the 3x3 grid, from the top left

_SEED_STRIDE = 1 << 40  # scripts of different seeds never meet


class Motion(StrEnum):
    STAY = "stay"
    RIGHT = "right"
    LEFT = "left"
    UP = "up"
    DOWN = "down"
    FROM_LEFT = "from left"
    FROM_RIGHT = "from right"


class Camera(StrEnum):
    STILL = "still"
    LEFT = "left"
    RIGHT = "right"


STEPS = {
    Motion.STAY: (0, 0),
    Motion.RIGHT: (2, 0),
    Motion.LEFT: (-2, 0),
    Motion.UP: (0, -2),
    Motion.DOWN: (0, 2),
    Motion.FROM_LEFT: (2, 0),
    Motion.FROM_RIGHT: (-2, 0),
}
"""Pixels right and down a frame; half of it for those that move slowly."""
PANS = {Camera.STILL: 0, Camera.LEFT: -1, Camera.RIGHT: 1}
"""Pixels a frame that the camera moves to the right: what it sees moves to the left."""
ENTERING_COLUMN = {Motion.FROM_LEFT: 0, Motion.FROM_RIGHT: 2}
MOVES = (Motion.RIGHT, Motion.LEFT, Motion.UP, Motion.DOWN)


@dataclass(frozen=True)
class Background:
    """One of PATTERNS in two different COLOURS. "plain" is a wall of the first above a floor of the second."""

    pattern: str
    colours: tuple[str, str]

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern '{self.pattern}': choose from {', '.join(PATTERNS)}.")
        if not set(self.colours) <= set(COLOURS) or len(set(self.colours)) != 2:
            raise ValueError(f"{self.colours} are no two different colours of {', '.join(COLOURS)}.")


@dataclass(frozen=True)
class Actor:
    """A thing in a shot. Things that come in start outside of the frame: of their place only the row counts, and
    the column is that of the side they come from."""

    noun: str
    size: str
    place: Place
    motion: Motion = Motion.STAY
    slow: bool = False

    def __post_init__(self) -> None:
        if self.noun not in NOUNS:
            raise ValueError(
                f"there is no picture of '{self.noun}': choose a noun of fastar.data.scenes.nouns."
            )
        if self.size not in SIZES:
            raise ValueError(f"unknown size '{self.size}': choose from {', '.join(SIZES)}.")
        if not all(0 <= i <= 2 for i in self.place):
            raise ValueError(f"a place is a row and a column from 0 to 2, not {self.place}.")
        if self.place[1] != ENTERING_COLUMN.get(self.motion, self.place[1]):
            raise ValueError(
                f"what comes in {self.motion} has its place in that column, not {self.place[1]}."
            )
        if self.slow and self.motion not in MOVES:
            raise ValueError(f"only what moves right, left, up or down can be slow, not '{self.motion}'.")

    def corner(self, phase: int, camera: Camera) -> tuple[int, int]:
        """x, y on the screen of the top left pixel of its cell, `phase` frames after the cut."""
        side = SIZES[self.size]
        x, y = CENTRES_X[self.place[1]] - side // 2, CENTRES_Y[self.place[0]] - side // 2
        if self.motion in ENTERING_COLUMN:
            x = -side if self.motion is Motion.FROM_LEFT else WIDTH
        right, down = (step // (2 if self.slow else 1) for step in STEPS[self.motion])
        return x + (right - PANS[camera]) * phase, y + down * phase


@dataclass(frozen=True)
class Shot:
    """Actors in the order of mention: later ones stand before earlier ones."""

    length: int
    background: Background
    camera: Camera
    actors: tuple[Actor, ...]

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(f"a shot has {LENGTHS} frames, not {self.length}.")
        if not 1 <= len(self.actors) <= MOST_ACTORS:
            raise ValueError(f"a shot has 1 to {MOST_ACTORS} actors, not {len(self.actors)}.")
        if len({a.noun for a in self.actors}) < len(self.actors):
            raise ValueError("the actors of a shot must be different nouns.")
        if len({a.place for a in self.actors}) < len(self.actors):
            raise ValueError("the actors of a shot must have different places.")


@dataclass(frozen=True)
class Script:
    """The shots of a video. `wording` chooses between ways to say the same and shows in no pixel."""

    shots: tuple[Shot, ...]
    wording: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.shots) <= MOST_SHOTS:
            raise ValueError(f"a script has 1 to {MOST_SHOTS} shots, not {len(self.shots)}.")

    @property
    def frames(self) -> int:
        return sum(shot.length for shot in self.shots)

    def timecode(self) -> list[tuple[int, int]]:
        """(number of the shot, frames since its cut) of every frame."""
        return [(number, phase) for number, shot in enumerate(self.shots) for phase in range(shot.length)]


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _held_out() -> frozenset[tuple[str, Motion]]:
    """One motion of every noun, and a second of the first 26 nouns: 90 of 448 pairs, chosen by a hash."""
    twice = sorted(NOUNS, key=_rank)[: round(len(NOUNS) * len(Motion) / 5) - len(NOUNS)]
    pairs = set()
    for noun in NOUNS:
        motions = sorted(Motion, key=lambda motion: _rank(f"{noun} {motion}"))
        pairs |= {(noun, motion) for motion in motions[: 1 + (noun in twice)]}
    return frozenset(pairs)


HELD_OUT = _held_out()
"""Pairs of noun and motion that training never shows, and held-out scripts are made of."""


def motions_of(noun: str, split: Split) -> tuple[Motion, ...]:
    """What this noun does in this split."""
    return tuple(motion for motion in Motion if ((noun, motion) in HELD_OUT) == (split == "heldout"))


def draw_script(index: int, *, seed: int = 0, split: Split = "train", frames: int = 96) -> Script:
    """The script of clip `index`, fixed by (seed, split, index, frames).

    A cast of 3 to 5 nouns, each of one size, and 2 or 3 backgrounds take turns, so that things leave and come back.
    Neighbouring shots differ in their background.

    Raises:
        ValueError: an unknown split, or `frames` that shots of 12 to 24 frames do not add up to.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be train or heldout, not '{split}'.")
    if frames % 4 or not LENGTHS[0] <= frames <= MOST_SHOTS * LENGTHS[-1]:
        raise ValueError(
            f"frames must be a multiple of 4 from 12 to {MOST_SHOTS * LENGTHS[-1]}, not {frames}."
        )
    rng = np.random.default_rng([seed * _SEED_STRIDE + index, split == "heldout"])
    nouns = rng.choice(len(NOUNS), rng.integers(3, 6), replace=False)
    cast = [(NOUNS[i], _pick(tuple(SIZES), rng)) for i in nouns]
    backgrounds: list[Background] = []
    while len(backgrounds) < 2 or (len(backgrounds) == 2 and rng.random() < 0.5):
        first, second = rng.choice(len(COLOURS), 2, replace=False)
        drawn = Background(_pick(PATTERNS, rng), (COLOURS[first], COLOURS[second]))
        if drawn not in backgrounds:
            backgrounds.append(drawn)
    shots: list[Shot] = []
    for length in _draw_lengths(frames, rng):
        others = [b for b in backgrounds if not shots or b != shots[-1].background]
        shots.append(_draw_shot(length, _pick(others, rng), cast, split, rng))
    return Script(tuple(shots), wording=int(rng.integers(1 << 32)))


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def _draw_lengths(frames: int, rng: np.random.Generator) -> list[int]:
    most = min(MOST_SHOTS, frames // LENGTHS[0])
    shots = int(rng.integers(min(most, -(-frames // 20)), most + 1))
    lengths = [LENGTHS[0]] * shots
    for _ in range((frames - sum(lengths)) // 4):
        growing = [i for i, length in enumerate(lengths) if length < LENGTHS[-1]]
        lengths[_pick(growing, rng)] += 4
    return lengths


def _draw_shot(
    length: int, background: Background, cast: list[tuple[str, str]], split: Split, rng: np.random.Generator
) -> Shot:
    camera = _pick(tuple(Camera), rng)
    members = [cast[i] for i in rng.permutation(len(cast))[: rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4])]]
    while True:
        actors: list[Actor] = []
        for noun, size in members:
            motion = _pick(motions_of(noun, split), rng)
            free = {(row, column) for row in range(3) for column in range(3)} - {a.place for a in actors}
            slow = motion in MOVES and rng.random() < 0.4
            options = [
                Actor(noun, size, place, motion, slow)
                for place in sorted(free)
                if place[1] == ENTERING_COLUMN.get(motion, place[1])
            ]
            options = [actor for actor in options if _is_in_sight(actor, length, camera)]
            if options:
                actors.append(_pick(options, rng))
        if len(actors) == len(members):
            return Shot(length, background, camera, tuple(actors))
        camera = Camera.STILL  # a pan away from what comes in never shows it


def _is_in_sight(actor: Actor, length: int, camera: Camera) -> bool:
    """At least half of it in the frame: half of the time, or at the end for what comes in."""
    side = SIZES[actor.size]
    seen = 0
    for phase in range(length):
        x, y = actor.corner(phase, camera)
        width = max(0, min(x + side, WIDTH) - max(x, 0))
        height = max(0, min(y + side, HEIGHT) - max(y, 0))
        seen += 2 * width * height >= side * side
    return seen >= (2 if actor.motion in ENTERING_COLUMN else length / 2)
