"""Sentences back into shots: what a person wrote, or what `write_prompt` did."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from fastar.data.scenes import prompt as words
from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.script import COLOURS, ENTERING_COLUMN, Actor, Background, Camera, Motion, Shot

K = TypeVar("K")


def read_shot(text: str, length: int) -> Shot:
    """The shot of `length` frames that a sentence in the words of prompt.py describes.

    Raises:
        ValueError: words that it does not know, or a sentence without exactly one background and one camera.
    """
    actors: list[Actor] = []
    backgrounds: list[Background] = []
    cameras: list[Camera] = []
    for part in re.split(r"[;,] ", text.strip().removesuffix(".").replace(words.ALONE, "")):
        if (background := _background(part)) is not None:
            backgrounds.append(background)
        elif (camera := _camera(part)) is not None:
            cameras.append(camera)
        elif (actor := _actor(part)) is not None:
            actors.append(actor)
        else:
            raise ValueError(f"cannot read '{part}': see the sentences of fastar/data/scenes/prompt.py.")
    if len(backgrounds) != 1 or len(cameras) != 1:
        raise ValueError(f"a shot needs one wall and one camera: '{text}'.")
    return Shot(length, backgrounds[0], cameras[0], tuple(actors))


def _background(part: str) -> Background | None:
    slots = {"wall": words.WALL_WORDS, "first": COLOURS, "second": COLOURS}
    for pattern, templates in words.BACKGROUNDS.items():
        if found := _match(templates, slots, part):
            return Background(pattern, (found["first"], found["second"]))
    return None


def _camera(part: str) -> Camera | None:
    if _match(words.STANDING, {}, part) is not None:
        return Camera.STILL
    found = _match(words.PANNING, {"verb": words.PAN_WORDS, "way": ("left", "right")}, part)
    return Camera(found["way"]) if found else None


def _actor(part: str) -> Actor | None:
    things = {"size": _all(words.SIZE_WORDS), "noun": NOUNS}
    placed = {**things, "place": _all(words.PLACE_WORDS)}
    moving = {**placed, "verb": words.MOVE_WORDS, "way": ("left", "right", "up", "down")}
    entering = {
        **things, "verb": words.ENTER_WORDS, "side": ("left", "right"), "row": _all(words.ROW_WORDS),
    }  # fmt: skip
    if found := _match(words.ENTERING, entering, part):
        motion = Motion(f"from {found['side']}")
        place = _meaning(words.ROW_WORDS, found["row"]), ENTERING_COLUMN[motion]
        return Actor(found["noun"], _meaning(words.SIZE_WORDS, found["size"]), place, motion)
    slow = False
    if found := _match(words.STAYING, {**placed, "verb": words.STAY_WORDS}, part):
        motion = Motion.STAY
    elif found := _match(words.MOVING, moving, part):
        motion = Motion(found["way"])
    elif found := _match(words.MOVING_SLOWLY, moving, part):
        motion, slow = Motion(found["way"]), True
    else:
        return None
    place = _meaning(words.PLACE_WORDS, found["place"])
    return Actor(found["noun"], _meaning(words.SIZE_WORDS, found["size"]), place, motion, slow)


def _match(templates: Iterable[str], slots: Mapping[str, Sequence[str]], part: str) -> dict[str, str] | None:
    """What the braces of the first template that fits hold."""
    for template in templates:
        pattern = template.replace("[", "").replace("]", "")
        for name, choices in slots.items():
            pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{'|'.join(choices)})")
        if found := re.fullmatch(pattern, part):
            return found.groupdict()
    return None


def _all(table: Mapping[K, Sequence[str]]) -> list[str]:
    return [word for choices in table.values() for word in choices]


def _meaning(table: Mapping[K, Sequence[str]], word: str) -> K:
    return next(key for key, choices in table.items() if word in choices)
