"""Whole rollouts that choose by the prompt: merged padding, prompt buckets, budgets of tokens, saved and resumed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.ann import LSHBucketizer
from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.attention.tags import PromptTags
from fastar.backbones import Backbone
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from fastar.engines import WILDCARD
from fastar.rollout.method import Method
from fastar.rollout.protocols import TeeCache, lockstep_a, lockstep_b
from fastar.rollout.rollout import Rollout
from fastar.sparsity import AnnCA, AnnSA, DenseCross, RankedCA, TokenTags
from fastar.sparsity.prompt_scores import ExactMass
from tests.rollout.test_prompts import CHUNK, GRID, SHAPE, TEXT, history, prompts, started, video
from tests.small import small_backbone, small_rollout, text_backbone

TAGGERS: dict[str, Any] = {
    "annca": partial(AnnCA, bucketizer=LSHBucketizer(bits=3, centre_queries=False)),
    "token": partial(TokenTags, tag_layer=1),
    "token_merged": partial(TokenTags, padding="merged", shared_heads=False),
}
CACHES: dict[str, Any] = {
    "dense": partial(DenseCache, storage="float32"),
    "window": partial(WindowCache, budget_frames=8),
    "tempcache": partial(TempCache, budget_frames=8),
}
SPARSE = partial(AnnSA, source="prompt", density=0.3, block_q=8, block_k=8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return text_backbone()


def ranked(**options: Any) -> RankedCA:
    return RankedCA(**({"scorer": ExactMass(), "share": 0.4} | options))


class Read:
    """Prompt tokens that each call of cross-attention read, and what a step's plan executes."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.planned: list[int] = []

    def on_attend(self, event: AttendEvent) -> None:
        kind, step = event.context.kind, event.context.step
        if event.stream == "self" and event.plan is not None:
            self.planned.append(step if kind == PassKind.DENOISE else -1)
        if event.stream == "text":
            live = (
                event.k.shape[2] if event.log_count is None else (event.log_count > -torch.inf).sum(-1).max()
            )
            self.tokens.setdefault(f"{kind} {step}", []).append(int(live))


# -- padding and budgets ---------------------------------------------------------------------------------------------


def test_merged_padding_is_dense_up_to_rounding(backbone: Backbone) -> None:
    given, read = prompts(9, 20), Read()
    merged = video(backbone, given, cross_attention=partial(DenseCross, padding="merged"), recorders=[read])
    torch.testing.assert_close(merged, video(backbone, given), rtol=1e-4, atol=1e-4)
    lone = video(
        backbone, prompts(9), cross_attention=partial(DenseCross, padding="merged"), recorders=[read]
    )
    torch.testing.assert_close(lone, video(backbone, prompts(9)), rtol=1e-4, atol=1e-4)
    assert {min(counts) for counts in read.tokens.values()} == {10}, "nine words and one padding"


@pytest.mark.parametrize("padding", ["attended", "merged"])
@pytest.mark.parametrize("scope", ["layer", "prompt"])
def test_all_tokens_are_dense_up_to_rounding(backbone: Backbone, scope: str, padding: str) -> None:
    made = partial(ranked, share=1.0, scope=scope, padding=padding, warmup_share=0.0, commit_dense=False)
    out = video(backbone, prompts(9, 20), cross_attention=made)
    torch.testing.assert_close(out, video(backbone, prompts(9, 20)), rtol=1e-4, atol=1e-4)


def test_a_budget_of_tokens_is_kept_in_sparse_steps(backbone: Backbone) -> None:
    read = Read()
    out = video(backbone, prompts(10), cross_attention=ranked, recorders=[read])
    assert (out - video(backbone, prompts(10))).abs().max() > 1e-4
    kept = 4 + TEXT - 10  # padding is always read
    assert {at: set(counts) for at, counts in read.tokens.items()} == {
        "prefill 0": {TEXT}, "denoise 0": {TEXT}, "denoise 1": {TEXT}, "denoise 2": {kept}, "denoise 3": {kept},
        "commit 0": {TEXT},
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"rebuild": "chunk"}, {"rebuild": "pass"}, {"scope": "layer"}], ids=str)
def test_budgets_resume_to_the_same_bits_and_forget_a_prompt_that_is_gone(
    backbone: Backbone, options: dict[str, Any]
) -> None:
    """Loaded into a rollout that stood elsewhere, also with sparse commits and frames rewritten under a new prompt."""
    make = partial(ranked, commit_dense=False, warmup_share=0.0, min_dense_steps=0, **options)
    rollout = started(backbone, prompts(20, 5), cross_attention=make)
    rollout.prefill(history(2))
    made = rollout.step()
    saved = rollout.state_dict()
    wanted = torch.cat([rollout.step(), rollout.step()], dim=1)
    rollout.load_state_dict(saved)  # chunks that it has made before
    assert torch.equal(torch.cat([rollout.step(), rollout.step()], dim=1), wanted)
    fresh = started(backbone, prompts(3, 4, seed=9), cross_attention=make)
    twins = (rollout, fresh)
    rollout.load_state_dict(saved)
    list(rollout.generate(CHUNK))
    rollout.load_state_dict(saved)
    fresh.load_state_dict(saved)
    for each in twins:
        each.change_prompts(prompts(7, 8, seed=1), made)
    assert torch.equal(*(each.step() for each in twins))


# -- prompt buckets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAGGERS)
def test_prompt_buckets_at_density_one_are_dense(backbone: Backbone, name: str) -> None:
    tagger = partial(TAGGERS[name], layers=()) if name == "annca" else TAGGERS[name]
    options = {"cross_attention": tagger}
    out = video(backbone, prompts(9, 20), self_attention=partial(SPARSE, density=1.0), **options)
    assert torch.equal(out, video(backbone, prompts(9, 20), **options))


@pytest.mark.parametrize("name", TAGGERS)
@pytest.mark.parametrize("density", [None, 0.3])
def test_prompt_buckets_select_in_sparse_steps(backbone: Backbone, name: str, density: float | None) -> None:
    read, options = Read(), {"cross_attention": TAGGERS[name]}
    sparse = partial(SPARSE, density=density)
    out = video(backbone, prompts(9, 20), self_attention=sparse, recorders=[read], **options)
    assert set(read.planned) == {2, 3} and torch.isfinite(out).all()
    assert (out - video(backbone, prompts(9, 20), **options)).abs().max() > 1e-4


@pytest.mark.parametrize("sparse_commits", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", TAGGERS)
def test_prompt_buckets_resume_to_the_same_bits(
    backbone: Backbone, name: str, cache: str, sparse_commits: bool, tmp_path: Any
) -> None:
    """Also after a change of prompts, with the last chunk rewritten."""
    selector = partial(SPARSE, commit_dense=not sparse_commits)
    options = {"cache": CACHES[cache], "self_attention": selector, "cross_attention": TAGGERS[name]}
    rollout = started(backbone, prompts(20, 5), **options)
    rollout.prefill(history(2))
    made = torch.cat([rollout.step() for _ in range(3)], dim=1)
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = started(backbone, prompts(3, 4, seed=9), **options)
    fresh.load_state_dict(saved)
    wanted = torch.cat([rollout.step(), rollout.step()], dim=1)
    assert torch.equal(torch.cat([fresh.step(), fresh.step()], dim=1), wanted)
    twins = [started(backbone, prompts(20, 5), **options), rollout]
    for twin in twins:
        twin.load_state_dict(saved)
        twin.change_prompts(prompts(7, 8, seed=1), made[:, -CHUNK:])
    assert torch.equal(*(twin.step() for twin in twins))


def lockstep(backbone: Backbone, cache: str, name: str) -> tuple[Rollout, Rollout, Tensor]:
    """Protocol A over two chunks: teacher and student at its end, and the trajectory."""
    trajectory = torch.randn(2, 3 * CHUNK, *SHAPE, generator=torch.Generator().manual_seed(3))
    own: CachePolicy = CACHES[cache]()
    tee = TeeCache(DenseCache(storage="float32"), [own])
    teacher = started(backbone, prompts(9, 20), cache=lambda: tee)
    options = {"self_attention": SPARSE, "cross_attention": TAGGERS[name]}
    student = started(backbone, prompts(9, 20), cache=lambda: own, **options)
    list(lockstep_a(teacher, {"student": student}, trajectory, None, CHUNK))
    return teacher, student, trajectory


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", TAGGERS)
def test_in_protocol_a_committed_tokens_are_tagged_by_the_teacher(
    backbone: Backbone, cache: str, name: str
) -> None:
    _, student, trajectory = lockstep(backbone, cache, name)
    tags = PromptTags(TAGGERS[name](padding="attended"), GRID)
    alone = started(backbone, prompts(9, 20), recorders=[tags])
    alone.prefill(trajectory)
    assert student.state.tags is not None
    found, wanted = student.state.tags.state_dict(), tags.state_dict()
    assert found.keys() == wanted.keys() == ({1} if name == "token" else {0, 1})
    for layer, expected in wanted.items():
        assert expected.shape[2] == 3 * CHUNK * GRID[0] * GRID[1] and expected.unique().numel() > 2
        assert torch.equal(found[layer], expected)


# -- protocol B, taken up again --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"cross_attention": partial(ranked, commit_dense=False)},
        {"cross_attention": TAGGERS["token"], "self_attention": partial(SPARSE, commit_dense=False)},
    ],
    ids=["ranked", "tags"],
)
def test_protocol_b_with_sparse_commits_goes_on_to_the_same_bits(
    backbone: Backbone, options: dict[str, Any]
) -> None:
    trajectory = torch.randn(1, 4 * CHUNK, *SHAPE, generator=torch.Generator().manual_seed(3))

    def chunks(done: int) -> list[Tensor]:
        rollout = started(backbone, prompts(9), **options)
        return [chunk for _, chunk in lockstep_b(rollout, trajectory, None, CHUNK, done=done)]

    whole, rest = chunks(0), chunks(2)
    assert len(whole) == 3 and len(rest) == 1 and torch.equal(whole[2], rest[0])


# -- projected once --------------------------------------------------------------------------------------------------


def test_a_prompt_is_projected_once_and_anew_when_it_changes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    project = backbone.transformer.project_text
    monkeypatch.setattr(
        backbone.transformer, "project_text", lambda text: given.append(text) or project(text)
    )
    rollout = started(backbone, prompts(9))
    rollout.prefill(history())
    list(rollout.generate(2 * CHUNK))
    assert len(given) == 1
    saved = rollout.state_dict()
    rollout.use_prompts(prompts(9, seed=1))
    assert len(given) == 1, "when it is needed"
    list(rollout.generate(2 * CHUNK))
    assert len(given) == 2 and not torch.equal(*given)
    rollout.load_state_dict(saved)
    list(rollout.generate(CHUNK))
    assert len(given) == 3 and torch.equal(given[0], given[2])


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_methods_that_choose_by_a_prompt_need_one() -> None:
    from fastar.rollout.method import start_rollout
    from tests.small import small_loop

    made: list[dict[str, Any]] = [
        {"cross_attention": ranked},
        {"cross_attention": TokenTags},
        {"self_attention": SPARSE, "cross_attention": TokenTags},
    ]
    for options in made:
        method = Method(name="words", **options)
        with pytest.raises(
            ValueError, match="'words' selects by a prompt and the backbone 'small' reads none"
        ):
            start_rollout(small_backbone(), method, loop=small_loop(), seeds=[0])
    small_rollout(small_backbone())


@pytest.mark.parametrize(
    ("cross_attention", "message"),
    [
        (
            partial(TokenTags, tag_layer=2),
            "tag_layer of the method 'test' asks for layer 2: .* has layers 0 to 1",
        ),
        (partial(TokenTags, tag_layer=-1), "tag_layer of the method 'test' asks for layer -1"),
        (partial(ranked, score_layers=[1, 7]), "score_layers of the method 'test' asks for layer 7"),
    ],
)
def test_a_layer_that_is_not_there_is_named(backbone: Backbone, cross_attention: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        started(backbone, prompts(9), cross_attention=cross_attention)


def test_prompt_buckets_need_somebody_who_tags(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="cross-attention gives none"):
        started(backbone, prompts(9), self_attention=SPARSE)


def test_tags_of_another_prompt_are_read_by_every_query(backbone: Backbone) -> None:
    """Numbers of the old prompt's tokens would match any words of the new one."""
    rollout = started(backbone, prompts(9, 20), self_attention=SPARSE, cross_attention=TAGGERS["token"])
    made = torch.cat(list(rollout.generate(3 * CHUNK)), 1)
    tags = rollout.state.tags
    assert tags is not None
    tokens = CHUNK * GRID[0] * GRID[1]
    assert (tags.state_dict()[1] != WILDCARD).all()
    rollout.change_prompts(prompts(12, 6), made[:, -CHUNK:])
    known = tags.state_dict()[1]
    assert (known[:, :, : 2 * tokens] == WILDCARD).all() and (known[:, :, 2 * tokens :] != WILDCARD).all()
    rollout.change_prompts(prompts(5, 5))
    assert (tags.state_dict()[1] == WILDCARD).all()
    assert torch.isfinite(rollout.step()).all()
