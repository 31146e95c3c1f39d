"""Endless clips of scripted scenes with their prompts, rendered where they are used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.render import render
from fastar.data.scenes.script import LENGTHS, MOST_SHOTS, Script, Split, draw_script
from fastar.data.shards import own_numbers

PHASES = LENGTHS[-1]
NUM_ACTIONS = MOST_SHOTS * PHASES
TEXT_LEN = 512
"""Tokens of a padded prompt."""
SHOT_CODE = 32
"""Channels behind a token's embedding that say which shot it belongs to."""
SHOT_CODE_AMPLITUDE = 0.5
"""The norm of the code is then 2; that of a token after three layers of MiniLM-L6 is about 12."""
_SENTENCES_KEPT = 256


class Encoder(Protocol):
    """A frozen text encoder."""

    def encode(self, sentences: list[str]) -> Sequence[Tensor]:
        """Embeddings [L_i, D] of every sentence's tokens, special tokens included."""


class ScenesClips(IterableDataset[dict[str, Tensor]]):
    """Clips of `frames` frames, each after a script of its own.

    An item is a dict:
        frames:  uint8 [F, 96, 128, 3], RGB.
        actions: int64 [F], the timecode: number of the shot * 24 + frames since its cut.
        index:   int64 []; the number of the clip. (seed, split, index, frames) fixes every bit of it.
        prompt:  float16 [512, D + 32], only with an `encoder`: embeddings of the sentences' tokens, each sentence
            encoded alone, one after the other; `shot_code` in the last 32 channels; zeros after the last token.
        prompt_tokens: int64 [], only with an `encoder`: tokens before the zeros.

    Clip number i belongs to shard i mod (ranks x loader workers), so ranks and workers never repeat each other
    (fastar/data/shards.py). `clips` ends the dataset after that many clips (all shards together); the first is
    number `first_index`. `numbered` gives chosen clips.
    """

    def __init__(
        self,
        *,
        frames: int = 96,
        seed: int = 0,
        split: Split = "train",
        clips: int | None = None,
        first_index: int = 0,
        encoder: Encoder | None = None,
    ) -> None:
        self.frames, self.seed, self.split = frames, seed, split
        self.clips, self.first_index, self.encoder = clips, first_index, encoder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.script(first_index)  # a wrong split or length fails here, not inside a worker

    def script(self, index: int) -> Script:
        """The script of clip `index`, without rendering."""
        return draw_script(index, seed=self.seed, split=self.split, frames=self.frames)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.numbered(own_numbers(self.first_index, self.clips))

    def numbered(self, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """The clips of these numbers, in this order, whatever the shard."""
        for index in numbers:
            script = self.script(index)
            item = {"frames": render(script), "actions": timecode(script), "index": torch.tensor(index)}
            if self.encoder is not None:
                prompt, tokens = pad_prompt(
                    self._encode([sentence.text for sentence in write_prompt(script)])
                )
                item |= {"prompt": prompt, "prompt_tokens": tokens}
            yield item

    def _encode(self, sentences: list[str]) -> list[Tensor]:
        """Embeddings of the sentences; those of late clips are kept. One by one: a batch might change their bits."""
        assert self.encoder is not None
        for sentence in sentences:
            if sentence not in self._kept:
                (self._kept[sentence],) = self.encoder.encode([sentence])
            self._kept.move_to_end(sentence)
        found = [self._kept[sentence] for sentence in sentences]
        while len(self._kept) > _SENTENCES_KEPT:
            self._kept.popitem(last=False)
        return found


def timecode(script: Script) -> Tensor:
    """int64 [F]: number of the shot * 24 + frames since its cut, below NUM_ACTIONS."""
    return torch.tensor([shot * PHASES + phase for shot, phase in script.timecode()])


def shot_code(shot: int) -> Tensor:
    """float32 [32]: sines and cosines of a shot's number, at 16 wavelengths from 2 to 32 shots."""
    angles = 2 * torch.pi * shot / torch.logspace(1, 5, SHOT_CODE // 2, base=2)
    return SHOT_CODE_AMPLITUDE * torch.cat([angles.sin(), angles.cos()])


def pad_prompt(sentences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings [L_i, D] of each shot's sentence -> (float16 [512, D + 32], int64 [] number of tokens).

    Raises:
        ValueError: more than 512 tokens.
    """
    tokens = torch.cat([
        torch.cat([embedding.float().cpu(), shot_code(shot).expand(len(embedding), -1)], dim=1)
        for shot, embedding in enumerate(sentences)
    ])  # fmt: skip
    if len(tokens) > TEXT_LEN:
        raise ValueError(f"a prompt of {len(tokens)} tokens does not fit into {TEXT_LEN}: write fewer shots.")
    prompt = torch.zeros(TEXT_LEN, tokens.shape[1], dtype=torch.float16)
    prompt[: len(tokens)] = tokens
    return prompt, torch.tensor(len(tokens))
