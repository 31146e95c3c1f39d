"""The text stream: padding merged or attended is the same attention, found once a prompt, and always read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann import ExactMatcher, KMeansBucketizer, LSHBucketizer, QuantizedBucketizer
from fastar.ann.base import Bucketizer
from fastar.attention import text
from fastar.attention.context import PassContext
from fastar.attention.text import Selection, TextStream
from fastar.engines.reference import attention_weights
from fastar.sparsity import AnnCA, CrossSelector, DenseCross, PromptKeys, RankedCA
from fastar.sparsity.base import Padding
from fastar.sparsity.prompt_scores import (
    ExactMass,
    LSHCounts,
    NearestVotes,
    QuantizedMass,
    RandomScores,
    TokenScorer,
)
from tests.small import DIM, HEADS, small_loop

LENGTH, WORDS = 12, (7, 4)
STEPS = list(small_loop().denoise_passes(0))


def qkv(seed: int = 0, words: tuple[int, ...] = WORDS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of prompts of unequal length, padded with one row; the first says a word twice."""
    generator = torch.Generator().manual_seed(seed)
    lead = (len(words), HEADS)
    q = torch.randn(*lead, 10, DIM, generator=generator)
    k, v = torch.randn(2, *lead, LENGTH, DIM, generator=generator)
    for b, count in enumerate(words):
        k[b, :, count:], v[b, :, count:] = k[b, :, -1:], v[b, :, -1:]
    if words[0] > 4:
        k[0, :, 3], v[0, :, 3] = k[0, :, 1], v[0, :, 1]
    return q, k, v


REAL = torch.tensor([[i < 7 and i not in (1, 3) for i in range(LENGTH)], [i < 4 for i in range(LENGTH)]])
"""Tokens that equal no other."""


class Nothing(CrossSelector):
    """Wants no token at all."""

    def __init__(self, padding: Padding) -> None:
        super().__init__(warmup_share=0.0, min_dense_steps=0)
        self.padding = padding

    def select(self, layer: int, context: PassContext, q: Tensor, prompt: PromptKeys) -> Tensor | None:
        return torch.zeros_like(prompt.real)


def oracle(padding: Padding, **options: Any) -> RankedCA:
    always = {"warmup_share": 0.0, "min_dense_steps": 0, "scope": "layer", "rebuild": "pass"}
    return RankedCA(**({"scorer": ExactMass(), "share": 0.5, "padding": padding} | always | options))


def read(stream: TextStream, context: PassContext, *given: Tensor) -> tuple[Tensor, Selection]:
    """One call, executed by the engine that is the definition."""
    k, v, log_count, selection = stream.prepare(0, context, *given)
    return engines.attend(given[0], k, v, log_count=log_count, engine="reference")[0], selection


def annca(bucketizer: Bucketizer) -> Any:
    return lambda padding: AnnCA(bucketizer=bucketizer, padding=padding, warmup_share=0.0, min_dense_steps=0)


def ranked(scorer: TokenScorer) -> Any:
    return lambda padding: oracle(padding, scorer=scorer)


MAKERS: dict[str, Any] = {
    "dense": DenseCross,
    "nothing": Nothing,
    "oracle": oracle,
    "votes": ranked(NearestVotes(matcher=ExactMatcher())),
    "counts": ranked(LSHCounts(bits=2, tables=3)),
    "tables": ranked(LSHCounts(bits=2, tables=3, counted="tables")),
    "codes": ranked(QuantizedMass(bits=4)),
    "random": ranked(RandomScores()),
    **{
        f"annca {kind.__name__} {centre}": annca(kind(bits=bits, centre=centre))
        for kind, bits in ((LSHBucketizer, 3), (QuantizedBucketizer, 2))
        for centre in (True, False)
    },
    "annca k-means": annca(KMeansBucketizer(clusters=5)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_merged_padding_is_attended_padding_with_less_work(name: str) -> None:
    given = qkv()
    streams = {padding: TextStream(MAKERS[name](padding=padding)) for padding in ("attended", "merged")}
    outs, widths = {}, {}
    for padding, stream in streams.items():
        outs[padding], _ = read(stream, STEPS[3], *given)
        widths[padding] = stream.prepare(0, STEPS[3], *given)[0].shape[2]
    torch.testing.assert_close(outs["merged"], outs["attended"], rtol=1e-5, atol=1e-6)
    assert widths["merged"] < widths["attended"]
    dense, _ = engines.attend(*given, engine="reference")
    assert torch.allclose(outs["attended"], dense, atol=1e-6) == (name == "dense")


@pytest.mark.parametrize("padding", ["attended", "merged"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_is_read_alike_alone_and_beside_a_longer_one(name: str, padding: Padding) -> None:
    given = qkv()
    together, _ = read(TextStream(MAKERS[name](padding=padding)), STEPS[3], *given)
    for video in range(len(WORDS)):
        own = [x[video : video + 1] for x in given]
        alone, _ = read(TextStream(MAKERS[name](padding=padding)), STEPS[3], *own)
        torch.testing.assert_close(alone[0], together[video], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["attended", "merged"])
def test_share_one_is_dense(padding: Padding) -> None:
    given = qkv()
    dense, _ = engines.attend(*given, engine="reference")
    for options in ({}, {"scope": "prompt", "rebuild": "chunk"}):
        stream = TextStream(oracle(padding, share=1.0, **options))
        for context in STEPS:
            out, _ = read(stream, context, *given)
            torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["attended", "merged"])
def test_padding_is_always_read_and_is_all_that_is_left_of_nothing(padding: Padding) -> None:
    q, k, v = qkv()
    out, selection = read(TextStream(Nothing(padding)), STEPS[0], q, k, v)
    hidden = torch.zeros(REAL.shape).masked_fill(REAL, -torch.inf)[:, None].expand(-1, HEADS, -1)
    expected = attention_weights(q, k, log_count=hidden) @ v
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    prompt, keep = selection.prompt, selection.keep
    assert keep is not None and not (keep & prompt.real).any()
    assert prompt.log_count is None or not keep[prompt.log_count == -torch.inf].any()


def test_a_selection_says_which_tokens_its_slots_are() -> None:
    q, k, v = qkv()
    _, attended = read(TextStream(oracle("attended")), STEPS[0], q, k, v)
    _, merged = read(TextStream(oracle("merged")), STEPS[0], q, k, v)
    assert attended.prompt.tokens is None and attended.prompt.log_count is None
    assert torch.equal(attended.prompt.real, REAL[:, None].expand(-1, HEADS, -1))
    tokens, counts = merged.prompt.tokens, merged.prompt.log_count
    assert tokens is not None and counts is not None
    assert tokens[0, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert counts[0, 0].exp().round().tolist() == [1, 2, 1, 1, 1, 1, 5]
    assert tokens[1, 1, :5].tolist() == [0, 1, 2, 3, 4] and (counts[1, :, 5:] == -torch.inf).all()
    assert torch.equal(merged.prompt.k, k.gather(2, tokens[..., None].expand(-1, -1, -1, DIM)))
    # the same tokens are kept, whichever way
    assert merged.keep is not None and attended.keep is not None
    for b in range(2):
        for h in range(HEADS):
            chosen = tokens[b, h][merged.keep[b, h] & merged.prompt.real[b, h]]
            assert chosen.tolist() == (attended.keep & attended.prompt.real)[b, h].nonzero()[:, 0].tolist()


def test_what_depends_on_the_prompt_alone_is_found_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    found = text.identical
    monkeypatch.setattr(text, "identical", lambda k, v: calls.append(k) or found(k, v))
    stream, (q, k, v), other = TextStream(DenseCross()), qkv(), qkv(1)
    for context in STEPS:
        for layer in (0, 1):
            stream.prepare(layer, context, q, k, v)
    assert len(calls) == 2
    _, selection = read(stream, STEPS[0], *other)
    assert len(calls) == 3 and selection.prompt.k is other[1], "another prompt"
    _, selection = read(stream, STEPS[0], q, k, v)
    assert len(calls) == 4 and selection.prompt.k is k, "and back"


@pytest.mark.parametrize("padding", ["attended", "merged"])
def test_room_for_the_kept_tokens_is_counted_once_a_prompt(
    padding: Padding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting makes a GPU wait; a longer prompt needs more room."""
    widths: list[int | None] = []
    gather = text.compact
    monkeypatch.setattr(text, "compact", lambda *a, width: widths.append(width) or gather(*a, width=width))
    stream = TextStream(oracle(padding))
    for words in ((7, 4), (11, 9)):
        q, k, v = qkv(words=words)
        for context in STEPS:
            kept_k, _, _, selection = stream.prepare(0, context, q + context.step, k, v)
            assert selection.keep is not None and kept_k.shape[2] == int(selection.keep.sum(-1).max())
    assert [width is None for width in widths] == [True, False, False, False] * 2
