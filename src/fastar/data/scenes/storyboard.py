"""Prompts that people write: a file of shots, a sentence each, which may change while the video is being made.

shots:
  - frames: 16
    text: a large owl rests in the center; the wall is plain red above a blue floor; the camera stays still.
  - frames: 24
    text: ...
changes:          # may be left out
  - at: 28        # the first frame that is made under the new prompt
    rewrite: 4    # frames before it that are cached again under the new prompt; 0 if left out
    shots: [...]  # instead of the shot that runs at this frame, from its cut on, and of all that were to follow
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import MISSING, DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from torch import Tensor

from fastar.data.scenes import embedding
from fastar.data.scenes.dataset import PHASES
from fastar.data.scenes.detector import Presence, presence
from fastar.data.scenes.embedding import Encoder
from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.reading import read_shot
from fastar.data.scenes.render import render
from fastar.data.scenes.script import LENGTHS, MOST_SHOTS, Script


@dataclass(frozen=True)
class Line:
    """A shot in words: how many frames it has, and its sentence."""

    frames: int = MISSING
    text: str = MISSING


@dataclass(frozen=True)
class _Change:
    at: int = MISSING
    rewrite: int = 0
    shots: list[Line] = MISSING


@dataclass(frozen=True)
class _File:
    shots: list[Line] = MISSING
    changes: list[_Change] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """A whole script in words, in force from frame `at` on; `rewrite` frames before it are cached again under it."""

    at: int
    rewrite: int
    lines: tuple[Line, ...]

    @property
    def frames(self) -> int:
        return sum(line.frames for line in self.lines)

    def embed(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        """Padded prompt and its tokens, as `embedding.embed` makes them; every sentence is encoded alone.

        Raises:
            ValueError: a word that the encoder does not know, a sentence or a prompt that is too long.
        """
        encoded: list[Tensor] = []
        for number, line in enumerate(self.lines, 1):
            try:
                encoded += encoder.encode([line.text])
            except ValueError as error:
                raise ValueError(f"shot {number} of the prompt from frame {self.at} on: {error}") from error
        return embedding.embed(encoder, [line.text for line in self.lines], encoded)

    def script(self) -> Script:
        """What the sentences say.

        Raises:
            ValueError: one of them is not made of the words of prompt.py.
        """
        return Script(tuple(read_shot(line.text, line.frames) for line in self.lines))


@dataclass(frozen=True)
class Storyboard:
    """Prompts in the order in which they come into force, the first at frame 0. A later one keeps every frame before it
    in the shot, and at the place in the shot, in which it was made."""

    prompts: tuple[Prompt, ...]

    @property
    def frames(self) -> int:
        return self.prompts[-1].frames

    def timecode(self) -> Tensor:
        """int64 [F], as `fastar.data.scenes.dataset.timecode`: number of the shot * 24 + frames since its cut."""
        lines = self.prompts[-1].lines
        return torch.tensor([n * PHASES + i for n, line in enumerate(lines) for i in range(line.frames)])

    def render(self) -> Tensor:
        """uint8 [F, 96, 128, 3]: what each frame shows according to the prompt in force.

        Raises:
            ValueError: as `Prompt.script`.
        """
        return torch.cat([render(prompt.script())[part] for prompt, part in self._parts()])

    def presence(self, frames: Tensor) -> Presence:
        """Whether the things of the prompt in force are where it says, in frames uint8 [F, 3, 96, 128].

        Raises:
            ValueError: as `Prompt.script`, or another number of frames.
        """
        if len(frames) != self.frames:
            raise ValueError(f"the prompts have {self.frames} frames, the video {len(frames)}.")
        found = []
        for prompt, part in self._parts():
            longest = torch.arange(prompt.frames).clamp(
                max=len(frames) - 1
            )  # frames that never came are not looked at
            whole = presence(frames[longest], prompt.script())
            found.append((whole.expected[part], whole.found[part]))
        expected, seen = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Presence(expected, seen)

    def plain(self) -> list[dict[str, Any]]:
        """What decides the video, in lists and dicts."""
        return [
            {"at": p.at, "rewrite": p.rewrite, "shots": [[line.frames, line.text] for line in p.lines]}
            for p in self.prompts
        ]

    def _parts(self) -> list[tuple[Prompt, slice]]:
        """Every prompt and the frames it is in force for."""
        ends = [prompt.at for prompt in self.prompts[1:]] + [self.frames]
        return [(prompt, slice(prompt.at, end)) for prompt, end in zip(self.prompts, ends, strict=True)]


def storyboard_of(script: Script) -> Storyboard:
    """A drawn script in its own words."""
    sentences = write_prompt(script)
    lines = [Line(shot.length, said.text) for shot, said in zip(script.shots, sentences, strict=True)]
    return Storyboard((Prompt(0, 0, tuple(lines)),))


def read_storyboard(path: str | Path, *, chunk: int) -> Storyboard:
    """The prompts of a file, to be made `chunk` frames at a time.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not make sense: one sentence says where and why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}; experiments/prompts/ has an example")
    try:
        written = _parsed(path)
        prompts = [Prompt(0, 0, tuple(written.shots))]
        _check_lines(prompts[0].lines, "shots")
        for number, change in enumerate(written.changes):
            prompts.append(_changed(prompts[-1], change, f"changes[{number}]", chunk))
        frames = prompts[-1].frames
        if frames % chunk:
            raise ValueError(f"{frames} frames are not a whole number of {chunk}-frame chunks")
    except ValueError as error:
        raise ValueError(f"prompt file {path}: {error}") from error
    return Storyboard(tuple(prompts))


def _parsed(path: Path) -> _File:
    try:
        read = OmegaConf.create(path.read_text(encoding="utf-8"))
        if not isinstance(read, DictConfig):
            raise ValueError("it must hold a list named shots, not be one")
        written = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_File), read))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing") from error
    except ConfigKeyError as error:
        known = ", ".join(each.name for each in fields(error.object_type or _File))
        raise ValueError(f"unknown key {str(error.key)!r}: choose from {known}") from error
    except OmegaConfBaseException as error:
        reason = str(error.msg).partition("\n")[0]
        raise ValueError(f"{error.full_key}: {reason}" if error.full_key else reason) from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"it is no YAML: {error.problem}{line}") from error
    assert isinstance(written, _File)
    return written


def _changed(before: Prompt, change: _Change, place: str, chunk: int) -> Prompt:
    """The prompt that a change makes of the one before it."""
    at, rewrite = change.at, change.rewrite
    if at % chunk or not before.at < at < before.frames:
        raise ValueError(
            f"{place}.at must be a multiple of {chunk}, where a chunk begins, after {before.at} and before "
            f"{before.frames}, got {at}"
        )
    if rewrite % chunk or not 0 <= rewrite <= at:
        raise ValueError(
            f"{place}.rewrite must be a multiple of {chunk} from 0 to {at}, the frames made by then, got {rewrite}"
        )
    kept: list[Line] = []
    start = 0  # of the shot that runs at `at`
    for line in before.lines:
        if start + line.frames > at:
            break
        kept.append(line)
        start += line.frames
    _check_lines(change.shots, f"{place}.shots", most=MOST_SHOTS - len(kept))
    if change.shots[0].frames <= at - start:
        raise ValueError(
            f"{place}.shots[0] takes the place of the shot that began at frame {start}: give it more than the "
            f"{at - start} frames that have been shown by frame {at}, or put the change at its end"
        )
    return Prompt(at, rewrite, (*kept, *change.shots))


def _check_lines(lines: list[Line] | tuple[Line, ...], place: str, most: int = MOST_SHOTS) -> None:
    if not 1 <= len(lines) <= most:
        over = f" ({MOST_SHOTS} with those that are over)" if most < MOST_SHOTS else ""
        raise ValueError(f"{place} must hold 1 to {most} shots{over}, not {len(lines)}")
    for number, line in enumerate(lines):
        if line.frames not in LENGTHS:
            lengths = ", ".join(map(str, LENGTHS))
            raise ValueError(f"{place}[{number}].frames must be one of {lengths}, got {line.frames}")
        if not line.text.strip():
            raise ValueError(f"{place}[{number}].text says nothing: write a sentence")
