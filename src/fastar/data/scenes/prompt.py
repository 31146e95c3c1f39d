"""Scripts in words: a sentence a shot, and which of its words say what."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastar.data.scenes.script import Actor, Background, Camera, Motion, Script, Shot

Kind = Literal["actor", "background", "camera"]
Span = tuple[int, int]  # characters, the second exclusive

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    (0, 0): ("upper left", "top left"),
    (0, 1): ("upper middle", "top center"),
    (0, 2): ("upper right", "top right"),
    (1, 0): ("middle left", "left side"),
    (1, 1): ("center", "very middle"),
    (1, 2): ("middle right", "right side"),
    (2, 0): ("lower left", "bottom left"),
    (2, 1): ("lower middle", "bottom center"),
    (2, 2): ("lower right", "bottom right"),
}
ROW_WORDS = {0: ("top",), 1: ("middle",), 2: ("bottom",)}
STAY_WORDS = ("stays", "waits", "rests")
MOVE_WORDS = ("moves", "travels", "goes")
ENTER_WORDS = ("comes in", "enters", "appears")
WALL_WORDS = ("wall", "backdrop")
PAN_WORDS = ("pans", "turns")

# In square brackets: the words that say something. In braces: what the script fills in.
STAYING = ("a [{size}] [{noun}] [{verb}] in the [{place}]", "in the [{place}] a [{size}] [{noun}] [{verb}]")
MOVING = (
    "a [{size}] [{noun}] [{verb}] [{way}] from the [{place}]",
    "from the [{place}] a [{size}] [{noun}] [{verb}] [{way}]",
)
MOVING_SLOWLY = (
    "a [{size}] [{noun}] [slowly] [{verb}] [{way}] from the [{place}]",
    "from the [{place}] a [{size}] [{noun}] [{verb}] [{way}] [slowly]",
)
ENTERING = (
    "a [{size}] [{noun}] [{verb}] from the [{side}] along the [{row}]",
    "along the [{row}] a [{size}] [{noun}] [{verb}] from the [{side}]",
)
BACKGROUNDS = {
    "plain": ("the {wall} is [plain] [{first}] above a [{second}] [floor]",),
    "level stripes": (
        "the {wall} has [{first}] and [{second}] [stripes] [across]",
        "the {wall} has [level] [stripes] in [{first}] and [{second}]",
    ),
    "upright stripes": (
        "the {wall} has [{first}] and [{second}] [stripes] [up and down]",
        "the {wall} has [upright] [stripes] in [{first}] and [{second}]",
    ),
    "checks": (
        "the {wall} has [{first}] and [{second}] [checks]",
        "the {wall} is [checked] in [{first}] and [{second}]",
    ),
    "dots": (
        "the {wall} is [{first}] with [{second}] [dots]",
        "the {wall} has [{second}] [dots] on [{first}]",
    ),
    "waves": (
        "the {wall} has [{first}] and [{second}] [waves]",
        "the {wall} has [waves] in [{first}] and [{second}]",
    ),
}
PANNING = ("the camera [{verb}] to the [{way}]", "the camera [{verb}] [{way}]")
STANDING = ("the camera stays [still]", "the camera does [not move]")
ALONE = " and nothing else is there"  # after the only actor of a shot
ORDERS: tuple[tuple[Kind, ...], ...] = (
    ("actor", "background", "camera"),
    ("background", "actor", "camera"),
    ("camera", "background", "actor"),
)

_MARKED = re.compile(r"\[([^]]*)\]")


@dataclass(frozen=True)
class Phrase:
    """Characters start to end of a sentence: what is said of one actor, of the background, or of the camera.

    `content` are the spans within it of the words that say something: noun, size, place, motion, colours, pattern,
    direction of the camera. The rest is function words.
    """

    start: int
    end: int
    kind: Kind
    actor: int | None
    content: tuple[Span, ...]


@dataclass(frozen=True)
class Sentence:
    """The text of a shot and its phrases in the order of the text."""

    text: str
    phrases: tuple[Phrase, ...]


def write_prompt(script: Script) -> tuple[Sentence, ...]:
    """A sentence for every shot; the prompt is their texts joined by spaces. Same words mean the same pixels."""
    return tuple(
        _write_shot(shot, np.random.default_rng([script.wording, number]))
        for number, shot in enumerate(script.shots)
    )


def _write_shot(shot: Shot, rng: np.random.Generator) -> Sentence:
    said: dict[Kind, list[str]] = {
        "actor": [_say_actor(actor, rng) for actor in shot.actors],
        "background": [_say_background(shot.background, rng)],
        "camera": [_say_camera(shot.camera, rng)],
    }
    order = ORDERS[rng.integers(len(ORDERS))]
    text, phrases = "", []
    for kind in order:
        for number, marked in enumerate(said[kind]):
            text += ("; " if number == 0 else ", ") if text else ""
            plain, content = _unmark(marked, len(text))
            actor = number if kind == "actor" else None
            phrases.append(Phrase(len(text), len(text) + len(plain), kind, actor, content))
            text += plain
        text += ALONE if kind == "actor" and len(shot.actors) == 1 else ""
    return Sentence(text + ".", tuple(phrases))


def _unmark(marked: str, start: int) -> tuple[str, tuple[Span, ...]]:
    """The text without its brackets, and what was in them as spans of a text where it begins at `start`."""
    spans: list[Span] = []
    for number, match in enumerate(_MARKED.finditer(marked)):
        begin = start + match.start() - 2 * number
        spans.append((begin, begin + len(match[1])))
    return _MARKED.sub(r"\1", marked), tuple(spans)


def _say_actor(actor: Actor, rng: np.random.Generator) -> str:
    words = {"noun": actor.noun, "size": _one_of(SIZE_WORDS[actor.size], rng)}
    if actor.motion in (Motion.FROM_LEFT, Motion.FROM_RIGHT):
        side = "left" if actor.motion is Motion.FROM_LEFT else "right"
        row = _one_of(ROW_WORDS[actor.place[0]], rng)
        return _one_of(ENTERING, rng).format(**words, verb=_one_of(ENTER_WORDS, rng), side=side, row=row)
    words["place"] = _one_of(PLACE_WORDS[actor.place], rng)
    if actor.motion is Motion.STAY:
        return _one_of(STAYING, rng).format(**words, verb=_one_of(STAY_WORDS, rng))
    templates = MOVING_SLOWLY if actor.slow else MOVING
    return _one_of(templates, rng).format(**words, verb=_one_of(MOVE_WORDS, rng), way=actor.motion)


def _say_background(background: Background, rng: np.random.Generator) -> str:
    first, second = background.colours
    template = _one_of(BACKGROUNDS[background.pattern], rng)
    return template.format(wall=_one_of(WALL_WORDS, rng), first=first, second=second)


def _say_camera(camera: Camera, rng: np.random.Generator) -> str:
    if camera is Camera.STILL:
        return _one_of(STANDING, rng)
    return _one_of(PANNING, rng).format(verb=_one_of(PAN_WORDS, rng), way=camera)


def _one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
