"""A budget of prompt tokens: how many are kept, which, and by the scores of which pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.engines.reference import attention_weights
from fastar.sparsity import PromptKeys
from fastar.sparsity.prompt_scores import ExactMass, RandomScores, TokenScorer
from fastar.sparsity.ranked_ca import RankedCA, best_share

from .conftest import denoise

BATCH, HEADS, WORDS, LENGTH = 2, 3, (13, 7), 20
COMMIT = PassContext(PassKind.COMMIT, 8, 4, (0.0,) * 4)


class FirstQuery(TokenScorer):
    """A token's score is a coordinate of the first query: a test says what a call wants."""

    def score(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        return q[:, :, 0, : prompt.k.shape[2]].float()


def prompt(words: tuple[int, ...] = WORDS) -> PromptKeys:
    """Prompts of unequal length, padded."""
    k = torch.randn(len(words), HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    real = torch.arange(LENGTH) < torch.tensor(words)[:, None, None]
    return PromptKeys(k, real.expand(-1, HEADS, -1))


def queries(seed: int) -> Tensor:
    return torch.randn(BATCH, HEADS, 30, LENGTH, generator=torch.Generator().manual_seed(seed))


def ranked(**options: object) -> RankedCA:
    """On in every denoising pass, unless told otherwise."""
    always = {"warmup_share": 0.0, "min_dense_steps": 0}
    return RankedCA(**({"scorer": FirstQuery(), "share": 0.4} | always | options))


def call(selector: RankedCA, layer: int, context: PassContext, seed: int) -> Tensor | None:
    """One call of cross-attention, as the text stream makes it."""
    q, given = queries(seed), prompt()
    selector.observe(layer, context, q, given)
    return selector.select(layer, context, q, given)


def best(seeds: list[int], *, share: float = 0.4, heads: bool = True) -> Tensor:
    """What scores of these calls choose together, for all heads at once."""
    scores = torch.stack([FirstQuery().score(queries(seed), prompt()) for seed in seeds]).sum(0)
    return by_sorting(
        scores.sum(1, keepdim=True).expand_as(scores) if heads else scores, prompt().real, share
    )


def by_sorting(scores: Tensor, real: Tensor, share: float) -> Tensor:
    """Python's stable sort, row by row."""
    keep = torch.zeros_like(real)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
        b, h = row
        tokens = [i for i in range(scores.shape[2]) if real[b, h, i]]
        count = math.ceil(round(len(tokens) * share, 6))
        for token in sorted(tokens, key=lambda i: -float(scores[b, h, i]))[:count]:
            keep[b, h, token] = True
    return keep


# -- how many and which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.25, 0.35, 0.5, 0.999, 1.0])
def test_the_best_share_is_that_of_a_sort_with_ties_to_the_earlier(share: float) -> None:
    """Scores of few levels, so that most tie; padding scores best of all and is never chosen."""
    real = prompt().real & (torch.rand(BATCH, HEADS, LENGTH) > 0.2)
    scores = torch.randint(0, 4, real.shape).float().masked_fill(~real, 99.0)
    keep = best_share(scores, real, share)
    assert torch.equal(keep, by_sorting(scores, real, share)) and not (keep & ~real).any()
    assert keep.sum(-1).tolist() == [
        [math.ceil(round(int(n) * share, 6)) for n in row] for row in real.sum(-1)
    ]


@pytest.mark.parametrize(
    ("words", "share", "kept"), [(20, 0.35, 7), (13, 0.35, 5), (1, 0.01, 1), (13, 1.0, 13)]
)
def test_shares_are_rounded_up_and_whole_ones_stay_whole(words: int, share: float, kept: int) -> None:
    real = prompt((words,)).real
    assert (best_share(torch.zeros(1, HEADS, LENGTH), real, share).sum(-1) == kept).all()


def test_a_prompt_of_padding_alone_keeps_none_of_it() -> None:
    nothing = torch.zeros(1, HEADS, LENGTH, dtype=torch.bool)
    assert not best_share(torch.rand(1, HEADS, LENGTH), nothing, 0.5).any()


# -- scope=layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_heads", [False, True])
def test_the_oracle_keeps_the_top_mass_of_its_own_pass(shared_heads: bool) -> None:
    oracle = ranked(scorer=ExactMass(), scope="layer", rebuild="pass", shared_heads=shared_heads)
    for step, layer in ((0, 0), (0, 1), (1, 0), (3, 1)):
        keep = call(oracle, layer, denoise(step, 4), 10 * step + layer)
        mass = attention_weights(queries(10 * step + layer), prompt().k).sum(2)
        mass = mass.sum(1, keepdim=True).expand_as(mass) if shared_heads else mass
        assert keep is not None and torch.equal(keep, by_sorting(mass, prompt().real, 0.4))


def test_a_layer_decides_once_a_chunk_by_the_first_pass() -> None:
    selector = ranked(scope="layer", rebuild="chunk")
    for step in range(4):
        for layer in range(2):
            keep = call(selector, layer, denoise(step, 4), 10 * step + layer)
            assert keep is not None and torch.equal(keep, best([layer], heads=False))
    keep = call(selector, 0, denoise(0, 4, first_frame=12), 77)
    assert keep is not None and torch.equal(keep, best([77], heads=False)), "a new chunk"


def test_commit_passes_without_denoising_decide_for_themselves_in_scope_layer() -> None:
    selector = ranked(scope="layer", rebuild="chunk", commit_dense=False)
    keep = call(selector, 0, COMMIT, 5)
    assert keep is not None and torch.equal(keep, best([5], heads=False))


# -- scope=prompt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_layers", [None, (1,), (0, 2)])
@pytest.mark.parametrize("rebuild", ["chunk", "pass"])
def test_one_decision_for_all_layers_and_heads(rebuild: str, score_layers: tuple[int, ...] | None) -> None:
    selector = ranked(rebuild=rebuild, score_layers=score_layers)
    for first in (8, 12):
        for step in range(4):
            for layer in range(3):
                keep = call(selector, layer, denoise(step, 4, first), 100 * first + 10 * step + layer)
                if step == 0:
                    assert keep is None, "the first pass of a chunk reads all"
                    continue
                decisive = 0 if rebuild == "chunk" else step - 1
                seeds = [100 * first + 10 * decisive + other for other in score_layers or (0, 1, 2)]
                assert keep is not None and torch.equal(keep, best(seeds))


@pytest.mark.parametrize("rebuild", ["chunk", "pass"])
@pytest.mark.parametrize("interlude", ["nothing", "half a pass", "commit"])
def test_a_chunk_that_is_started_over_forgets_its_first_attempt(rebuild: str, interlude: str) -> None:
    again, fresh = (ranked(rebuild=rebuild, commit_dense=False) for _ in range(2))
    for step in range(3):
        for layer in range(2):
            call(again, layer, denoise(step, 4), 50 + 10 * step + layer)
    if interlude == "half a pass":
        call(again, 0, denoise(3, 4), 90)
    if interlude == "commit":
        assert call(again, 0, COMMIT, 90) is not None
    for step in range(4):
        for layer in range(2):
            keeps = [call(s, layer, denoise(step, 4), 10 * step + layer) for s in (again, fresh)]
            assert (keeps[0] is None) == (keeps[1] is None) == (step == 0)
            assert step == 0 or torch.equal(*keeps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rebuild", "decisive"), [("chunk", 0), ("pass", 3)])
def test_sparse_commits_read_what_their_chunk_decided(rebuild: str, decisive: int) -> None:
    selector = ranked(rebuild=rebuild, commit_dense=False)
    for step in range(4):
        for layer in range(2):
            call(selector, layer, denoise(step, 4), 10 * step + layer)
    for layer in range(2):
        keep = call(selector, layer, COMMIT, 99)
        assert keep is not None and torch.equal(keep, best([10 * decisive, 10 * decisive + 1]))
    for kind in (PassKind.PREFILL, PassKind.REWRITE):
        assert call(selector, 0, PassContext(kind, 8, 4, (0.0,) * 4), 99) is None, "no pass goes before"
    other = PassContext(PassKind.COMMIT, 16, 4, (0.0,) * 4)
    assert call(selector, 0, other, 99) is None, "a chunk that was never denoised"


def test_the_schedule_decides_when_it_is_on() -> None:
    selector = RankedCA(scorer=FirstQuery(), share=0.4, layers=[1])
    found = {(s, l): call(selector, l, denoise(s, 4), 10 * s + l) for s in range(4) for l in range(2)}
    assert {at for at, keep in found.items() if keep is not None} == {(2, 1), (3, 1)}
    assert torch.equal(found[3, 1], best([0, 1])), "layers that stay dense are heard"  # type: ignore[arg-type]
    assert call(selector, 1, COMMIT, 0) is None


def test_random_scores_choose_the_same_tokens_everywhere() -> None:
    selector = ranked(scorer=RandomScores(seed=1))
    keeps = [call(selector, layer, denoise(step, 4), 10 * step) for step in range(3) for layer in range(2)]
    assert keeps[0] is None and all(torch.equal(keep, keeps[2]) for keep in keeps[3:])  # type: ignore[arg-type]
    assert not torch.equal(
        RandomScores(seed=2).score(queries(0), prompt()), RandomScores(seed=1).score(queries(0), prompt())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share is of the prompt's tokens, in \(0, 1\], got 0.0"),
        ({"share": 35}, r"share is of the prompt's tokens"),
        ({"scope": "head"}, "scope must be one of layer, prompt, got 'head'"),
        ({"rebuild": "never"}, "rebuild must be one of pass, chunk"),
        ({"padding": "dropped"}, "padding must be one of attended, merged"),
        ({"score_layers": []}, "score_layers names no layer"),
        ({"warmup_share": 30}, "warmup_share is a share"),
    ],
)
def test_unusable_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranked(**options)
