"""Scores of prompt tokens against loops over queries, tokens and tables; padding and empty slots change no order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastar.ann import ExactMatcher, FaissMatcher, LSHMatcher, Matcher, QuantizedMatcher
from fastar.ann.base import seeded_normal, seeded_planes
from fastar.sparsity import PromptKeys
from fastar.sparsity.prompt_scores import (
    ExactMass,
    LSHCounts,
    NearestVotes,
    QuantizedMass,
    RandomScores,
    TokenScorer,
    mean_of_real,
)

BATCH, HEADS, QUERIES, TOKENS, DIM = 2, 2, 15, 12, 8
LSH = LSHCounts(bits=2, tables=5, seed=3)


def given(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, PromptKeys]:
    """Queries, and keys about a common mean: prompts of 9 and 5 tokens, padded with one row."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, QUERIES, DIM, generator=generator)
    k = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator) + 2
    real = (torch.arange(TOKENS) < torch.tensor([[9], [5]])[:, None]).expand(BATCH, HEADS, TOKENS)
    k = torch.where(real[..., None], k, torch.ones(DIM))
    return q.to(dtype), PromptKeys(k.to(dtype), real)


def with_empty_slots(prompt: PromptKeys) -> PromptKeys:
    """The padding merged into one slot, in front of empty slots that hold anything."""
    first_pad = prompt.real.sum(-1, keepdim=True)
    places = torch.arange(TOKENS)
    log_count = torch.zeros(prompt.real.shape).masked_fill(places > first_pad, -torch.inf)
    log_count = torch.where(places == first_pad, (TOKENS - first_pad).float().log(), log_count)
    k = torch.where((places > first_pad)[..., None], 7.0, prompt.k)
    return PromptKeys(k, prompt.real, log_count, places.expand(prompt.real.shape))


def faiss() -> Matcher:
    pytest.importorskip("faiss")
    return FaissMatcher()


SCORERS: dict[str, TokenScorer] = {
    "mass": ExactMass(),
    "quantized": QuantizedMass(bits=8),
    "lsh": LSH,
    "votes": NearestVotes(matcher=ExactMatcher()),
    "votes_lsh": NearestVotes(matcher=LSHMatcher(bits=3, tables=4)),
    "votes_quantized": NearestVotes(matcher=QuantizedMatcher(bits=4)),
    "random": RandomScores(),
}


def test_mass_is_the_attention_that_a_token_gets() -> None:
    q, prompt = given()
    scores = ExactMass().score(q, prompt)
    for b in range(BATCH):
        for h in range(HEADS):
            rows = [(q[b, h, i] * prompt.k[b, h]).sum(-1).div(DIM**0.5).exp() for i in range(QUERIES)]
            expected = torch.stack([row / row.sum() for row in rows]).sum(0)
            torch.testing.assert_close(scores[b, h], expected)


def test_eight_bits_come_close_to_it_and_two_do_not() -> None:
    q, prompt = given()
    exact = ExactMass().score(q, prompt)
    off = [(QuantizedMass(bits=bits).score(q, prompt) - exact).abs().max() for bits in (8, 2)]
    assert off[0] < 0.05 < 0.3 < off[1]
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bits must be from 2 to 8"):
            QuantizedMass(bits=bits)


def test_lsh_counts_queries_in_the_bucket_of_a_token() -> None:
    """Table by table, bit by bit; or the tables in which any query does."""
    q, prompt = given()
    scores, planes = LSH.score(q, prompt), seeded_normal(3, DIM, 10, like=q)
    tables = LSHCounts(bits=2, tables=5, counted="tables", seed=3).score(q, prompt)

    def bucket(x: Tensor, table: int) -> tuple[bool, ...]:
        return tuple(float(x @ planes[:, 2 * table + bit]) > 0 for bit in range(2))

    for b, words in enumerate((9, 5)):
        for h in range(HEADS):
            centre = prompt.k[b, h, :words].mean(0)
            for token in range(TOKENS):
                shared = [
                    sum(
                        bucket(q[b, h, i], table) == bucket(prompt.k[b, h, token] - centre, table)
                        for i in range(QUERIES)
                    )
                    for table in range(5)
                ]
                assert scores[b, h, token] == sum(shared)
                assert tables[b, h, token] == sum(count > 0 for count in shared)
    assert 0 < scores.min() < scores.max() <= 5 * QUERIES and tables.min() < tables.max()
    with pytest.raises(ValueError, match="counted must be one of queries, tables"):
        LSHCounts(counted="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tables must be at least 1"):
        LSHCounts(tables=0)
    with pytest.raises(ValueError, match="bits must be from 1 to 16"):
        LSHCounts(bits=17)


@pytest.mark.parametrize("make", [ExactMatcher, faiss], ids=["exact", "faiss"])
def test_votes_go_to_the_real_token_of_the_largest_product(make: type[Matcher]) -> None:
    q, prompt = given()
    scores = NearestVotes(matcher=make()).score(q, prompt)
    for b, words in enumerate((9, 5)):
        for h in range(HEADS):
            winners = [int((prompt.k[b, h, :words] @ q[b, h, i]).argmax()) for i in range(QUERIES)]
            assert scores[b, h].tolist() == [winners.count(token) for token in range(TOKENS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_votes_of_half_precision_are_told_apart_in_float32(dtype: torch.dtype) -> None:
    """Products of about 2,000 that differ by less than the dtype can say."""
    q = torch.full((1, 1, 4, 8), 16.0, dtype=dtype)
    k = torch.full((1, 1, 3, 8), 16.0, dtype=dtype)
    k[0, 0, 2, 0] += 0.125 if dtype == torch.bfloat16 else 0.03125
    k[0, 0, 0] -= 1
    prompt = PromptKeys(k, torch.ones(1, 1, 3, dtype=torch.bool))
    scores = NearestVotes(matcher=ExactMatcher()).score(q, prompt)
    assert scores.tolist() == [[[0.0, 0.0, 4.0]]]


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_finite_and_float32_also_of_padding_alone(name: str, dtype: torch.dtype) -> None:
    q, prompt = given(dtype=dtype)
    for case in (prompt, dataclasses.replace(prompt, real=torch.zeros_like(prompt.real))):
        scores = SCORERS[name].score(q, case)
        assert scores.dtype == torch.float32 and scores.shape == prompt.real.shape
        assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", ["lsh", "votes", "votes_lsh", "votes_quantized", "random"])
def test_what_pads_a_prompt_changes_no_score_of_a_token(name: str) -> None:
    q, prompt = given()
    dirty = torch.where(prompt.real[..., None], prompt.k, -50.0)
    scores, other = (SCORERS[name].score(q, p) for p in (prompt, dataclasses.replace(prompt, k=dirty)))
    assert torch.equal(scores[prompt.real], other[prompt.real]) and scores[prompt.real].unique().numel() > 2


@pytest.mark.parametrize("name", SCORERS)
def test_merged_padding_and_empty_slots_change_no_score_of_a_token(name: str) -> None:
    q, prompt = given()
    merged = with_empty_slots(prompt)
    if name == "quantized":  # empty slots of a merge hold copies of tokens, and one scale serves a head
        merged = dataclasses.replace(merged, k=prompt.k)
    scores, other = (SCORERS[name].score(q, p) for p in (prompt, merged))
    torch.testing.assert_close(scores[prompt.real], other[prompt.real])


def test_the_mean_is_of_real_tokens() -> None:
    _, prompt = given()
    mean = mean_of_real(prompt)
    torch.testing.assert_close(mean[1, 0, 0], prompt.k[1, 0, :5].mean(0))
    assert (mean_of_real(dataclasses.replace(prompt, real=torch.zeros_like(prompt.real))) == 0).all()


def test_hyperplanes_are_made_once() -> None:
    with torch.inference_mode():
        planes = seeded_planes(5, 8, 3, like=torch.empty(0))
    assert planes is seeded_planes(5, 8, 3, like=torch.zeros(2, 2)) and not planes.is_inference()
    assert torch.equal(planes, seeded_normal(5, 8, 3, like=planes))
    half = seeded_planes(5, 8, 3, like=torch.empty(0, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.equal(half, planes.bfloat16())
