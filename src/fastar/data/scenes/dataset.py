"""Endless clips of scripted scenes with their prompts, rendered where they are used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastar.data.scenes import embedding
from fastar.data.scenes.embedding import Encoder
from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.render import render
from fastar.data.scenes.script import LENGTHS, MOST_SHOTS, Script, Split, draw_script
from fastar.data.scenes.truth import PhraseTokens, phrases_of, relevance
from fastar.data.shards import own_numbers

PHASES = LENGTHS[-1]
NUM_ACTIONS = MOST_SHOTS * PHASES
_SENTENCES_KEPT = 256


class ScenesClips(IterableDataset[dict[str, Tensor]]):
    """Clips of `frames` frames, each after a script of its own.

    An item is a dict:
        frames:  uint8 [F, 96, 128, 3], RGB.
        actions: int64 [F], the timecode: number of the shot * 24 + frames since its cut.
        index:   int64 []; the number of the clip. (seed, split, index, frames) fixes every bit of it.
        prompt, prompt_tokens: only with an `encoder`; see `fastar.data.scenes.embedding.embed`.

        relevance: bool [F, 512], only with an `encoder` and `truth`: which tokens matter to a frame
            (`fastar.data.scenes.truth.relevance`).

    With `encode_later` items carry the prompt's numbers instead (`embedding.number`), and `finish` encodes those of a
    batch at once, on its device: a loader worker then spends a third of the time on a clip.

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
        encode_later: bool = False,
        truth: bool = False,
    ) -> None:
        self.frames, self.seed, self.split = frames, seed, split
        self.clips, self.first_index = clips, first_index
        self.encoder, self.encode_later, self.truth = encoder, encode_later, truth
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
                sentences = [sentence.text for sentence in write_prompt(script)]
                if self.encode_later:
                    item |= embedding.number(self.encoder, sentences)
                else:
                    prompt, tokens = embedding.embed(self.encoder, sentences, self._encode(sentences))
                    item |= {"prompt": prompt, "prompt_tokens": tokens}
                if self.truth:
                    item["relevance"] = self._relevance(script, sentences)
            yield item

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of items, on the device where it is used: with `encode_later`, its prompts are encoded."""
        if self.encoder is None or not self.encode_later:
            return batch
        return embedding.embed_batch(self.encoder, batch)

    def phrases(self, index: int) -> list[PhraseTokens]:
        """What the prompt of clip `index` says, phrase by phrase, and the tokens that say it. Needs an `encoder`."""
        script = self.script(index)
        return phrases_of(script, self._offsets([sentence.text for sentence in write_prompt(script)]))

    def _offsets(self, sentences: list[str]) -> list[tuple[int, int, int]]:
        assert self.encoder is not None
        return [(shot, *span) for shot, text in enumerate(sentences) for span in self.encoder.offsets(text)]

    def _relevance(self, script: Script, sentences: list[str]) -> Tensor:
        offsets = self._offsets(sentences)
        padded = torch.zeros(script.frames, embedding.TEXT_LEN, dtype=torch.bool)
        padded[:, : len(offsets)] = relevance(script, offsets)
        return padded

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
