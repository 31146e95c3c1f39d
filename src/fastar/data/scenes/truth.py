"""Which tokens of the prompt matter to a frame, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.data.scenes.prompt import Phrase, write_prompt
from fastar.data.scenes.render import Truth, truth
from fastar.data.scenes.script import HEIGHT, WIDTH, Script

LEAST_VISIBLE = 0.1
"""Visible share from which on an actor's words matter to a frame."""

Offsets = Sequence[tuple[int, int, int]]
"""Of every token of the concatenated prompt: number of its shot, first character in the shot's sentence, end."""


def relevance(script: Script, offsets: Offsets) -> Tensor:
    """bool [F, T]: whether a token matters to a frame.

    It does if it belongs to the sentence of the frame's shot, is part of a word that says something (not a function
    word, punctuation or a special token, whose span is empty), and speaks of the background, of the camera, or of an
    actor that is visible by at least `LEAST_VISIBLE`.
    """
    return _relevance(truth(script), token_phrases(script, offsets), offsets)


def regions(script: Script, offsets: Offsets) -> Tensor:
    """float32 [F, T, 4]: where in the frame a token matters, x0, y0, x1, y1 in pixels.

    The actor's box cut at the frame's edges; the whole frame for background and camera; zeros where the token is not
    relevant.
    """
    shown = truth(script)
    phrases = token_phrases(script, offsets)
    boxes = torch.zeros(script.frames, len(offsets), 4)
    frame = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    for token, phrase in enumerate(phrases):
        if phrase is None:
            continue
        if phrase.actor is None:
            boxes[:, token] = frame * torch.tensor([0, 0, 1, 1])
        else:
            boxes[:, token] = shown.boxes[:, phrase.actor].clamp(min=0).minimum(frame)
    return boxes * _relevance(shown, phrases, offsets)[..., None]


@dataclass(frozen=True)
class PhraseTokens:
    """What a prompt says of one actor, of the background or of the camera, and the tokens that say it."""

    shot: int
    text: str
    tokens: tuple[int, ...]


def phrases_of(script: Script, offsets: Offsets) -> list[PhraseTokens]:
    """The phrases of a prompt in the order of its text, with their content tokens (no function words)."""
    phrases = token_phrases(script, offsets)
    found: list[PhraseTokens] = []
    for shot, sentence in enumerate(write_prompt(script)):
        for phrase in sentence.phrases:
            tokens = [
                token
                for token, (own, (of, _, _)) in enumerate(zip(phrases, offsets, strict=True))
                if own == phrase and of == shot
            ]
            found.append(PhraseTokens(shot, sentence.text[phrase.start : phrase.end], tuple(tokens)))
    return found


def token_phrases(script: Script, offsets: Offsets) -> list[Phrase | None]:
    """The phrase that each token is a content token of; None for function words, punctuation and special tokens."""
    sentences = write_prompt(script)
    return [
        next(
            (
                phrase
                for phrase in sentences[shot].phrases
                if any(start < last and first < end for first, last in phrase.content)
            ),
            None,
        )
        for shot, start, end in offsets
    ]


def _relevance(shown: Truth, phrases: Sequence[Phrase | None], offsets: Offsets) -> Tensor:
    relevant = torch.zeros(len(shown.shot), len(offsets), dtype=torch.bool)
    for token, (phrase, (shot, _, _)) in enumerate(zip(phrases, offsets, strict=True)):
        if phrase is not None:
            seen = phrase.actor is None or shown.visible[:, phrase.actor] >= LEAST_VISIBLE
            relevant[:, token] = (shown.shot == shot) & seen
    return relevant
