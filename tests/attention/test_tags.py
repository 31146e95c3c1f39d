"""Prompt buckets: queries have those of the pass before, cached slots those of their commit pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.attention.rope import grid_positions
from fastar.attention.state import AttentionState
from fastar.attention.tags import CommittedTags, tags_for
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from fastar.engines.plan import WILDCARD
from fastar.rollout.loops import StaggeredLoop
from fastar.sparsity import AnnSA, Dense, DenseCross, PromptKeys, Selector, SelectRequest, TokenTags
from tests.small import CHUNK, DIM, GRID, HEADS, LAYERS, TOKENS, small_loop, small_state

LOOP = small_loop()
POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "dense": lambda: DenseCache(storage="float32"),
    "window": lambda: WindowCache(budget_frames=6),
    "tempcache": lambda: TempCache(budget_frames=8),
}


class Spy(Selector):
    """Remembers the tags that it is given in every pass, and computes all pairs."""

    wants_tags = True

    def __init__(self) -> None:
        super().__init__(warmup_share=0.0, min_dense_steps=0, commit_dense=False)
        self.requests: list[SelectRequest] = []

    def select(self, request: SelectRequest) -> None:
        self.requests.append(request)


class Told(DenseCross):
    """The tag of a query is its first coordinate."""

    tags_tokens = True

    def __init__(self, tag_layer: int | None = None) -> None:
        super().__init__()
        self.tag_layer = tag_layer

    def tag(self, q: Tensor, prompt: PromptKeys) -> Tensor:
        return q[..., 0].long()


def told(context: PassContext, layer: int) -> Tensor:
    """A tag for every token of the pass [1, H, L], no two alike in a rollout: at most 2^24, which float32 holds."""
    tokens = torch.arange(context.num_frames * TOKENS) + context.first_frame * TOKENS
    heads = torch.arange(HEADS)[:, None] + HEADS * layer
    steps = [9 if part.kind != PassKind.DENOISE else part.step for part in context.parts]
    number = torch.tensor(steps).repeat_interleave(len(tokens) // len(steps))
    return (tokens * 100 + heads * 10 + number)[None]


def run_pass(state: AttentionState, context: PassContext, *, shift: int = 0, layers: int = LAYERS) -> None:
    """One pass: in every layer self-attention, then cross-attention. It is aborted if it ends early."""
    length = context.num_frames * TOKENS
    q, k, v = torch.randn(
        3, 1, HEADS, length, DIM, generator=torch.Generator().manual_seed(context.first_frame)
    )
    state.begin_pass(context)
    for layer in range(layers):
        state.attend("self", layer, q, k, v)
        state.attend("text", layer, told_queries(told(context, layer) + shift), k[:, :, :5], v[:, :, :5])
    state.end_pass() if layers == LAYERS else state.abort_pass()


def told_queries(tags: Tensor) -> Tensor:
    return torch.cat([tags[..., None].float(), torch.zeros(*tags.shape, DIM - 1)], dim=-1)


def started(policy: str = "dense", tag_layer: int | None = None) -> tuple[AttentionState, Spy]:
    spy = Spy()
    return small_state(POLICIES[policy](), spy, Told(tag_layer)), spy


def chunk(state: AttentionState, number: int) -> None:
    """Denoised and committed."""
    for context in LOOP.denoise_passes(number * CHUNK):
        run_pass(state, context)
    run_pass(state, LOOP.commit_pass(number * CHUNK))


def of_slots(positions: Tensor, layer: int) -> Tensor:
    """What the commit passes said of the tokens at positions [1, H, S, 3]."""
    frame, row, column = positions.unbind(-1)
    token = (frame * GRID[0] + row) * GRID[1] + column
    return token * 100 + (torch.arange(HEADS)[:, None] + HEADS * layer) * 10 + 9


@pytest.mark.parametrize("tag_layer", [None, 0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_queries_have_the_tags_of_the_pass_before_and_slots_those_of_their_commit(
    policy: str, tag_layer: int | None
) -> None:
    """Also after eviction and merging: a slot is known by the position of its key."""
    state, spy = started(policy, tag_layer)
    for number in range(6):
        chunk(state, number)
    views = [state.cache.view(layer) for layer in range(LAYERS)]
    slots = [view.positions.clone() for view in views if view.positions is not None]
    assert len(slots) == LAYERS and (policy == "dense") == (slots[0].shape[2] == 6 * CHUNK * TOKENS)
    spy.requests.clear()
    passes = [*LOOP.denoise_passes(6 * CHUNK), LOOP.commit_pass(6 * CHUNK)]
    for context in passes:
        run_pass(state, context)
    first, *later = zip(spy.requests[::2], spy.requests[1::2], strict=True)
    assert all(request.text_tags is None and request.key_tags is None for request in first)
    for (before, now), requests in zip(pairwise(passes), later, strict=True):
        for layer, request in enumerate(requests):
            source = layer if tag_layer is None else tag_layer
            assert request.context == now and request.layer == layer
            assert request.text_tags is not None and request.key_tags is not None
            cached = slots[layer].shape[2]
            assert torch.equal(request.text_tags, told(before, source))
            assert torch.equal(request.key_tags[..., cached:], told(before, source))
            expected = of_slots(slots[layer], source)
            live = torch.ones_like(expected, dtype=torch.bool)
            if request.log_count is not None:
                live = (request.log_count[..., :cached] > -torch.inf).expand_as(live)
            assert live.any() and torch.equal(request.key_tags[..., :cached][live], expected[live])


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_in_flight_have_the_tags_of_their_own_pass_before(causal: bool) -> None:
    """A chunk that has just been begun has none; of others in flight nobody asks; all are gone with their commit."""
    state, spy = started("window")
    loop = StaggeredLoop(chunk_frames=CHUNK, timesteps=[1000, 700, 400], stagger=1, causal=causal)
    size, steps = CHUNK * TOKENS, []
    for number in range(4):
        for context in loop.denoise_passes(number * CHUNK, steps):
            spy.requests.clear()
            run_pass(state, context)
            steps = [part.step + 1 for part in context.parts]
            requests = {(request.layer, request.context.first_frame): request for request in spy.requests}
            assert len(requests) == LAYERS * len(steps)
            for (layer, first), request in requests.items():
                part, place = request.context, (first - context.first_frame) // CHUNK
                assert request.num_current == (place + 1 if causal else len(steps)) * size
                if part.step == 0:
                    assert request.text_tags is None and request.key_tags is None
                    continue
                before = told(replace(part, step=part.step - 1), layer)
                assert request.text_tags is not None and request.key_tags is not None
                assert request.key_tags.shape[2] == request.k.shape[2]
                current = request.key_tags[..., -request.num_current :].split(size, dim=2)
                assert torch.equal(request.text_tags, before) and torch.equal(current[place], before)
                others = [tags for chunk, tags in enumerate(current) if chunk != place]
                assert all((tags == WILDCARD).all() for tags in others)
        steps = steps[1:]
        assert state.in_flight()["tags"].keys() == {(number + n) * CHUNK for n in range(3)}
        run_pass(state, loop.commit_pass(number * CHUNK))
        assert spy.requests[-1].text_tags is not None, "a commit has those of its last step"
        assert state.in_flight()["tags"].keys() == {(number + n) * CHUNK for n in (1, 2)}


def test_only_what_asks_for_tags_pays_for_them() -> None:
    state = small_state(DenseCache(), Dense(), Told())
    assert state.tags is None and state.recorders == []
    with pytest.raises(ValueError, match=r"source=prompt.* gives none: use a text backbone with .*annca_\*"):
        tags_for(AnnSA(source="prompt"), DenseCross(), GRID)


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_a_chunk_that_is_started_over_forgets_the_first_attempt(layers: int) -> None:
    """After two steps and a third that may fail in its middle; the prompt says something else the second time."""
    state, spy = started()
    chunk(state, 0)
    steps = list(LOOP.denoise_passes(CHUNK))
    run_pass(state, steps[0], shift=7)
    run_pass(state, steps[1], shift=7)
    run_pass(state, steps[2], shift=7, layers=layers)
    spy.requests.clear()
    for context in steps:
        run_pass(state, context)
    found = [request.text_tags for request in spy.requests[::2]]
    assert found[0] is None
    for tags, before in zip(found[1:], steps, strict=False):
        assert tags is not None and torch.equal(tags, told(before, 0))


def test_a_rewritten_chunk_has_no_pass_before_it_and_new_tags_after_it() -> None:
    state, spy = started()
    for number in range(3):
        chunk(state, number)
    spy.requests.clear()
    state.rewrite(2 * CHUNK)
    run_pass(state, replace(LOOP.commit_pass(2 * CHUNK), kind=PassKind.REWRITE), shift=3)
    assert [request.text_tags for request in spy.requests] == [None] * LAYERS
    for context in list(LOOP.denoise_passes(3 * CHUNK))[:2]:
        run_pass(state, context)
    tags = spy.requests[-LAYERS].key_tags
    assert tags is not None
    cached = of_slots(grid_positions(0, 3 * CHUNK, GRID)[None, None], 0)
    cached[..., 2 * CHUNK * TOKENS :] += 3
    assert torch.equal(tags[..., : -CHUNK * TOKENS], cached)


def test_frames_that_were_never_tagged_are_in_every_bucket() -> None:
    state, _ = started()
    run_pass(state, LOOP.commit_pass(2 * CHUNK))
    assert state.tags is not None
    tags = state.tags.state_dict()[0]
    assert (tags[..., : 2 * CHUNK * TOKENS] == WILDCARD).all() and tags.dtype == torch.int32
    assert torch.equal(tags[..., 2 * CHUNK * TOKENS :].long(), told(LOOP.commit_pass(2 * CHUNK), 0))


def test_a_saved_state_knows_its_tags() -> None:
    (state, spy), (fresh, seen) = started("window"), started("window")
    for number in range(5):
        chunk(state, number)
    saved = state.state_dict()
    fresh.load_state_dict(saved)
    assert saved["tags"][0].data_ptr() != fresh.state_dict()["tags"][0].data_ptr()
    for each in (state, fresh):
        chunk(each, 5)
    assert len(seen.requests) == 5 * LAYERS
    for mine, other in zip(seen.requests, spy.requests[-5 * LAYERS :], strict=True):
        for a, b in ((mine.text_tags, other.text_tags), (mine.key_tags, other.key_tags)):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    assert (saved["tags"][0].shape[2]) == 5 * CHUNK * TOKENS, "a copy: what came later is not in it"


def test_another_rollout_tags_by_its_commits_alone() -> None:
    state, _ = started()
    assert state.tags is not None
    teacher = small_state(DenseCache(), recorders=[CommittedTags(state.tags)])
    for context in LOOP.denoise_passes(0):
        run_pass(teacher, context)
    assert state.tags.state_dict() == {}
    run_pass(teacher, LOOP.commit_pass(0))
    assert torch.equal(state.tags.state_dict()[1].long(), told(LOOP.commit_pass(0), 1))


@pytest.mark.parametrize("shared_heads", [False, True])
def test_token_tags_name_the_token_that_is_attended_to_most(shared_heads: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, 9, DIM, generator=generator)
    k = torch.randn(2, HEADS, 6, DIM, generator=generator)
    real = (torch.arange(6) < torch.tensor([[5], [3]])[:, None]).expand(2, HEADS, 6)
    k = torch.where(real[..., None], k, q.mean(2, keepdim=True) * 9)  # padding would win
    found = TokenTags(shared_heads=shared_heads).tag(q, PromptKeys(k, real))
    for b, words in enumerate((5, 3)):
        weights = (q[b] @ k[b, :, :words].mT / DIM**0.5).softmax(-1)
        expected = (weights.sum(0).expand_as(weights) if shared_heads else weights).argmax(-1)
        assert torch.equal(found[b], expected)
    nothing = TokenTags(shared_heads=shared_heads).tag(q, PromptKeys(k, torch.zeros_like(real)))
    assert (nothing == 0).all()


def test_token_tags_are_tokens_also_where_slots_are_merged() -> None:
    """A word said twice moves the slots of all words after it; tags of both kinds of padding must agree."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, 9, DIM, generator=generator)
    k, v = k[:, :, :8].clone(), v[:, :, :8].clone()
    k[:, :, 2], v[:, :, 2] = k[:, :, 0], v[:, :, 0]
    found = []
    for padding in ("attended", "merged"):
        tagger = TokenTags(padding=padding)  # type: ignore[arg-type]
        state = small_state(DenseCache(), Spy(), tagger)
        state.begin_pass(LOOP.commit_pass(0))
        state.attend("text", 0, q, k, v)
        state.abort_pass()
        assert state.tags is not None
        found.append(state.tags.state_dict()[0])
    assert torch.equal(*found) and found[0].max() > 2
