"""A prompt as a backbone reads it: the embeddings of its sentences' tokens, each sentence encoded alone, and codes of
where a token stands: in which shot, and in which clause of the shot's sentence."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastar.data.scenes.script import MOST_SHOTS

TEXT_LEN = 512
"""Tokens of a padded prompt."""
SHOT_CODE, CLAUSE_CODE = 32, 16
"""Channels behind a token's embedding that say which shot it belongs to, and which clause of the shot's sentence."""
_CLAUSE_ENDS = ",;"


class Encoder(Protocol):
    """A frozen text encoder, such as `fastar.backbones.text.TextEncoder`."""

    @property
    def positions(self) -> int:
        """Tokens of the longest sentence."""
        ...

    def encode(self, sentences: list[str]) -> Sequence[Tensor]:
        """Embeddings [L_i, D] of every sentence's tokens, special tokens included."""
        ...

    def offsets(self, sentence: str) -> Sequence[tuple[int, int]]:
        """First character of each token and the one after its last; (0, 0) for special tokens."""
        ...

    def numbers(self, sentence: str) -> list[int]:
        """The tokens as numbers, for `encode_numbers`."""
        ...

    def encode_numbers(self, numbers: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings [N, L, D] of sentences given as numbers [N, L], zeros behind their lengths [N]."""
        ...


def position_code(number: int, channels: int, longest: int) -> Tensor:
    """float32 [channels], norm sqrt(channels / 2): sines and cosines of a number, wavelengths from 2 to `longest`."""
    wavelengths = torch.logspace(1, torch.tensor(longest).log2().item(), channels // 2, base=2)
    angles = 2 * torch.pi * number / wavelengths
    return torch.cat([angles.sin(), angles.cos()])


def codes(encoder: Encoder, sentences: Sequence[str]) -> Tensor:
    """float32 [T, 48]: the codes of the shot and the clause of every token of the concatenated prompt.

    Clauses end with a comma or a semicolon; special tokens belong to the first. A clause's code says which words are
    about the same thing: a token's embedding hardly tells (noun to place by a linear probe: 21 %, three layers or six).
    """
    shots = torch.stack([position_code(shot, SHOT_CODE, 4 * MOST_SHOTS) for shot in range(len(sentences))])
    rows = []
    for shot, sentence in zip(shots, sentences, strict=True):
        for start, _ in encoder.offsets(sentence):
            clause = sum(sentence.count(end, 0, start) for end in _CLAUSE_ENDS)
            rows.append(torch.cat([shot, position_code(clause, CLAUSE_CODE, 8)]))
    return torch.stack(rows)


def embed(encoder: Encoder, sentences: Sequence[str], embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The prompt of these sentences, a shot each, from their embeddings [L_i, D].

    Returns:
        float16 [512, D + 48]: embeddings and codes of the tokens, one sentence after the other, then zeros.
        int64 []: tokens before the zeros.

    Raises:
        ValueError: more than 512 tokens.
    """
    tokens = torch.cat([torch.cat([e.float().cpu() for e in embeddings]), codes(encoder, sentences)], dim=1)
    _check(len(tokens))
    prompt = torch.zeros(TEXT_LEN, tokens.shape[1], dtype=torch.float16)
    prompt[: len(tokens)] = tokens
    return prompt, torch.tensor(len(tokens))


def number(encoder: Encoder, sentences: Sequence[str]) -> dict[str, Tensor]:
    """The same prompt before it is encoded, for `embed_batch`: prompts of equal shapes.

    Returns a dict:
        prompt_numbers: int64 [8, P], of each shot's tokens; zeros behind them; P the longest sentence.
        prompt_lengths: int64 [8], tokens of each shot; 0 for shots that are not there.
        prompt_codes:   float16 [512, 48], zeros behind the last token.

    Raises:
        ValueError: more than 512 tokens, or more than 8 sentences.
    """
    if len(sentences) > MOST_SHOTS:
        raise ValueError(f"a prompt has at most {MOST_SHOTS} sentences, one a shot, not {len(sentences)}.")
    numbers = torch.zeros(MOST_SHOTS, encoder.positions, dtype=torch.int64)
    lengths = torch.zeros(MOST_SHOTS, dtype=torch.int64)
    for shot, sentence in enumerate(sentences):
        row = torch.tensor(encoder.numbers(sentence))
        numbers[shot, : len(row)], lengths[shot] = row, len(row)
    _check(int(lengths.sum()))
    padded = torch.zeros(TEXT_LEN, SHOT_CODE + CLAUSE_CODE, dtype=torch.float16)
    padded[: lengths.sum()] = codes(encoder, sentences)
    return {"prompt_numbers": numbers, "prompt_lengths": lengths, "prompt_codes": padded}


def embed_batch(encoder: Encoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`batch` of prompts as `number` leaves them, with a leading dimension -> `prompt` and `prompt_tokens` instead.

    They are those of `embed` up to rounding; computed where the numbers are.
    """
    numbers, lengths, padded = (batch[f"prompt_{name}"] for name in ("numbers", "lengths", "codes"))
    found = encoder.encode_numbers(numbers.flatten(0, 1), lengths.flatten())
    found = found.unflatten(0, numbers.shape[:2])
    # token t of the prompt is token t - (tokens of the shots before) of its shot
    ends = lengths.cumsum(1)
    token = torch.arange(TEXT_LEN, device=lengths.device).expand(len(lengths), -1).contiguous()
    shot = torch.searchsorted(ends, token, right=True).clamp(max=lengths.shape[1] - 1)
    place = (token - (ends - lengths).gather(1, shot)).clamp(max=numbers.shape[2] - 1)
    rows = torch.arange(len(lengths), device=lengths.device)[:, None]
    inside = token < ends[:, -1:]
    embedded = found[rows, shot, place].where(inside[..., None], 0)
    others = {key: value for key, value in batch.items() if not key.startswith("prompt_")}
    prompt = torch.cat([embedded, padded.to(embedded)], dim=2).half()
    return others | {"prompt": prompt, "prompt_tokens": ends[:, -1]}


def _check(tokens: int) -> None:
    if tokens > TEXT_LEN:
        raise ValueError(f"a prompt of {tokens} tokens does not fit into {TEXT_LEN}: write fewer shots.")
