"""Actions that people write down: held keys, named paths, files, and chance."""

from pathlib import Path

import numpy as np

from fastar.data.doom.camera import Action

KEYS = {
    "none": Action.NONE,
    "forward": Action.FORWARD,
    "backward": Action.BACKWARD,
    "left": Action.TURN_LEFT,
    "right": Action.TURN_RIGHT,
    "forward_left": Action.FORWARD_LEFT,
    "forward_right": Action.FORWARD_RIGHT,
}
PATHS = {
    "spin": "left*48",
    "look_aside": "left*16,none*4,right*16,none*4",
    "there_and_back": "forward*12,left*24,forward*12,left*24",
    "circle": "forward_left*48",
}
"""Scripts by name; each ends where it began unless a wall is in the way."""

_WANDER = (
    ("forward", 5),
    ("left", 2),
    ("right", 2),
    ("forward_left", 1),
    ("forward_right", 1),
    ("backward", 1),
)
_LONGEST_HOLD = 16  # frames a random key is held


def read_actions(text: str, frames: int, *, seed: int = 0) -> list[int]:
    """`frames` actions (`camera.Action`) from what a person asked for.

    Args:
        text: `random` (keys held for a while, drawn from `seed`); a name in `PATHS` or a script such as
            `forward*20,left*12`, repeated as often as it takes; or a file of keys or numbers, separated by commas or
            white space, which must be long enough.

    Raises:
        ValueError: an unknown key, a count that is no number, or a file that is too short.
    """
    if text == "random":
        return _random(frames, np.random.default_rng(seed))
    path = Path(text)
    if path.is_file():
        recorded = [action for word in path.read_text().replace(",", " ").split() for action in _held(word)]
        if len(recorded) < frames:
            raise ValueError(f"{text} holds {len(recorded)} actions, but {frames} frames were asked for")
        return recorded[:frames]
    script = [action for word in PATHS.get(text, text).split(",") for action in _held(word.strip())]
    return (script * -(-frames // len(script)))[:frames]


def _held(word: str) -> list[int]:
    """`left*12` or `3` as actions."""
    key, _, times = word.partition("*")
    if times and not (times.isdecimal() and int(times)):
        raise ValueError(f"'{word}' is no key and count: write for example left*12")
    if key.isdecimal() and int(key) < len(Action):
        return [int(key)] * int(times or 1)
    if key not in KEYS:
        raise ValueError(
            f"unknown action '{key}': choose keys from {', '.join(KEYS)}, a path from {', '.join(PATHS)}, "
            "random, or the name of a file"
        )
    return [int(KEYS[key])] * int(times or 1)


def _random(frames: int, rng: np.random.Generator) -> list[int]:
    keys, weights = zip(*_WANDER, strict=True)
    shares = np.array(weights) / sum(weights)
    actions: list[int] = []
    while len(actions) < frames:
        key = keys[rng.choice(len(keys), p=shares)]
        actions += [int(KEYS[key])] * int(rng.integers(1, _LONGEST_HOLD + 1))
    return actions[:frames]
