"""One rollout's attention state: passes are atomic, denoising leaves no trace, every call is seen by the recorders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext, PassKind
from fastar.attention.events import AttendEvent
from fastar.attention.rope import grid_positions
from fastar.attention.state import AttentionState
from fastar.cache import (
    CachePolicy,
    DenseCache,
    EmptyCache,
    RandomCache,
    TempCache,
    TempCachePaper,
    WindowCache,
)
from fastar.engines.plan import BlockPlan
from fastar.sparsity import AnnCA, Selector, SelectRequest
from tests.small import CHUNK, DIM, GRID, HEADS, LAYERS, TOKENS, small_loop, small_state

POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "dense": lambda: DenseCache(storage="float32"),
    "window": lambda: WindowCache(budget_frames=6),
    "random": lambda: RandomCache(budget_frames=8),
    "tempcache": lambda: TempCache(budget_frames=8),
    "paper": lambda: TempCachePaper(threshold=0.3),
    "empty": EmptyCache,
}
LOOP = small_loop()


def qkv(seed: int, tokens: int = CHUNK * TOKENS) -> Tensor:
    """Raw q, k, v [3, 1, H, L, D]."""
    return torch.randn(3, 1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def forward(state: AttentionState, context: PassContext, seed: int, layers: int = LAYERS) -> list[Tensor]:
    """The attention calls of one pass over the first `layers` layers; the caller ends it."""
    state.begin_pass(context)
    return [state.attend("self", layer, *qkv(seed + layer)) for layer in range(layers)]


def commit(state: AttentionState, chunk: int, seed: int | None = None) -> list[Tensor]:
    outs = forward(state, LOOP.commit_pass(chunk * CHUNK), 100 * chunk if seed is None else seed)
    state.end_pass()
    return outs


def denoise(state: AttentionState, chunk: int, step: int = 3) -> list[Tensor]:
    outs = forward(state, list(LOOP.denoise_passes(chunk * CHUNK))[step], 7000 + step)
    state.end_pass()
    return outs


def saved_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(saved_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.fixture(params=POLICIES)
def state(request: pytest.FixtureRequest) -> AttentionState:
    """The state after five committed chunks, more than the budgets hold."""
    state = small_state(POLICIES[request.param]())
    for chunk in range(5):
        commit(state, chunk)
    return state


# -- passes ----------------------------------------------------------------------------------------------------------


def test_a_pass_that_fails_in_a_late_layer_changes_no_layer_and_can_be_repeated(
    state: AttentionState,
) -> None:
    before, expected = state.state_dict(), None
    for attempt in range(2):
        forward(state, LOOP.commit_pass(5 * CHUNK), 500 + attempt, layers=LAYERS - 1)
        state.abort_pass()  # as the rollout does when the backbone raises
        assert saved_equal(state.state_dict(), before)
        expected = commit(state, 5)
        after = state.state_dict()
        state.load_state_dict(before)
    assert not saved_equal(after, before)
    again = commit(state, 5)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert saved_equal(state.state_dict(), after)


@pytest.mark.parametrize("name", ["window", "tempcache"])
def test_an_error_inside_the_commit_itself_changes_no_layer_and_can_be_repeated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, twin = small_state(POLICIES[name]()), small_state(POLICIES[name]())
    for chunk in range(5):
        commit(state, chunk), commit(twin, chunk)
    before, absorb = state.state_dict(), type(state.cache).absorb  # type: ignore[attr-defined]

    def fails_late(self: Any, layer: int, *rest: Any) -> Any:
        if layer == LAYERS - 1:
            raise torch.OutOfMemoryError("no memory for the last layer")
        return absorb(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(state.cache), "absorb", fails_late)
        with pytest.raises(torch.OutOfMemoryError):
            commit(state, 5)
    assert saved_equal(state.state_dict(), before)
    commit(state, 5), commit(twin, 5)
    assert saved_equal(state.state_dict(), twin.state_dict())


def test_a_commit_that_misses_a_layer_is_refused(state: AttentionState) -> None:
    before = state.state_dict()
    forward(state, LOOP.commit_pass(5 * CHUNK), 0, layers=1)
    with pytest.raises(ValueError, match=r"every layer staged; missing: \[1\]"):
        state.end_pass()
    assert saved_equal(state.state_dict(), before)
    commit(state, 5)


def test_denoising_leaves_no_trace(state: AttentionState) -> None:
    before = state.state_dict()
    first = [denoise(state, 5, step) for step in range(4)]
    assert saved_equal(state.state_dict(), before)
    second = [denoise(state, 5, step) for step in range(4)]
    assert all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("stream", ["self", "text", "image", "mouse", "keyboard"])
def test_attention_outside_a_pass_is_refused(stream: str) -> None:
    state = small_state(DenseCache())
    with pytest.raises(RuntimeError, match="outside a pass: call begin_pass first"):
        state.attend(stream, 0, *qkv(0))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="outside a pass"):
        state.end_pass()


def test_passes_do_not_nest_and_a_state_is_saved_between_them() -> None:
    state = small_state(DenseCache())
    state.begin_pass(LOOP.commit_pass(0))
    with pytest.raises(RuntimeError, match="begin_pass was called inside a pass"):
        state.begin_pass(LOOP.commit_pass(0))
    with pytest.raises(RuntimeError, match="saved between passes only"):
        state.state_dict()
    state.abort_pass()
    commit(state, 0)


def test_an_unknown_engine_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown attention engine 'fast': choose one of auto"):
        AttentionState(**(vars_of_small_state() | {"engine": "fast"}))
    assert AttentionState(**vars_of_small_state()).engine in engines.names()


def test_a_state_says_which_engines_were_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.auto.ORDER, "cpu", ("fa4", "sdpa"))
    state = AttentionState(**vars_of_small_state())
    assert state.engine == "sdpa" and state.passed_over == {"fa4": "it runs on cuda, not on cpu"}
    assert AttentionState(**(vars_of_small_state() | {"engine": "reference"})).passed_over == {}


def vars_of_small_state() -> dict[str, Any]:
    state = small_state(DenseCache())
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "head_dim": DIM, "batch": 1, "chunk_frames": CHUNK}
    parts = {"self_selector": state.self_selector, "cross_selector": state.cross_selector, "rope": state.rope}
    where = {"compute_dtype": torch.float32, "device": torch.device("cpu"), "engine": "auto"}
    return {"cache": DenseCache(), "grid": GRID, **parts, **sizes, **where}


# -- what is attended ------------------------------------------------------------------------------------------------


def test_a_chunk_reads_everything_before_it_and_itself_under_rope() -> None:
    """Against attention over the whole sequence, written out."""
    state = small_state(DenseCache(storage="float32"))
    outs = [commit(state, chunk)[1] for chunk in range(3)]
    q, k, v = torch.cat([qkv(100 * chunk + 1) for chunk in range(3)], dim=3)
    positions = grid_positions(0, 3 * CHUNK, GRID)
    q, k = (state.rope.rotate(x, positions).double() for x in (q, k))
    chunks = positions[:, 0] // CHUNK
    logits = (q @ k.mT / DIM**0.5).masked_fill(chunks[:, None] < chunks, -torch.inf)
    torch.testing.assert_close(
        torch.cat(outs, dim=2).double(), logits.softmax(-1) @ v.double(), rtol=0, atol=1e-5
    )


class Spy(Selector):
    """Remembers its requests; its plan is every pair, or that of a function."""

    def __init__(self, match_space: str = "roped") -> None:
        super().__init__(warmup_share=0.0, min_dense_steps=0)
        self.match_space = match_space  # type: ignore[assignment]
        self.requests: list[SelectRequest] = []

    def select(self, request: SelectRequest) -> BlockPlan | None:
        self.requests.append(replace(request, k=request.k.clone()))
        return None


@pytest.mark.parametrize("policy", ["dense", "tempcache"])
@pytest.mark.parametrize("space", ["roped", "raw"])
def test_a_selector_sees_cached_keys_then_the_current_chunk(policy: str, space: str) -> None:
    spy = Spy(space)
    state = small_state(POLICIES[policy](), spy)
    for chunk in range(6):
        commit(state, chunk)
    assert not spy.requests, "commit passes are dense"
    denoise(state, 6)
    view, request = state.cache.view(1), spy.requests[1]
    assert (
        request.layer == 1
        and request.context.first_frame == 6 * CHUNK
        and request.context.kind == PassKind.DENOISE
    )
    assert request.num_current == CHUNK * TOKENS
    q, k, _ = qkv(7003 + 1)
    positions = grid_positions(6 * CHUNK, CHUNK, GRID)
    assert torch.equal(request.q, state.rope.rotate(q, positions))
    assert torch.equal(request.k, torch.cat([view.k, state.rope.rotate(k, positions)], dim=2))
    if policy == "dense":
        assert request.log_count is None
    else:
        assert (
            torch.equal(request.log_count[..., :-12], view.log_count)
            and (request.log_count[..., -12:] == 0).all()
        )
        assert (request.log_count > 0).any()
    if space == "roped":
        assert request.k_raw is None
    else:
        assert torch.equal(request.q_raw, q) and torch.equal(request.k_raw[:, :, -12:], k)
        past = state.rope.unrotate(view.k, view.positions)
        torch.testing.assert_close(request.k_raw[:, :, :-12], past, rtol=0, atol=1e-6)


class OwnChunkOnly(Spy):
    """Executes the blocks of the current chunk and no other."""

    def select(self, request: SelectRequest) -> BlockPlan:
        lead, queries, keys = request.q.shape[:2], request.q.shape[2], request.k.shape[2]
        order = [torch.arange(n).expand(*lead, n) for n in (queries, keys)]
        mask = torch.zeros(*lead, 1, keys // TOKENS, dtype=torch.bool)
        mask[..., -CHUNK:] = True
        return BlockPlan(*order, block_q=queries, block_k=TOKENS, block_mask=mask)


def test_a_plan_is_executed_in_sparse_steps_alone() -> None:
    state, empty = small_state(DenseCache(), OwnChunkOnly()), small_state(EmptyCache())
    for chunk in range(3):
        commit(state, chunk), commit(empty, chunk)
    for a, b in zip(denoise(state, 3), denoise(empty, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    state.self_selector.min_dense_steps = 4
    assert (denoise(state, 3)[0] - denoise(empty, 3)[0]).abs().max() > 1e-2


# -- rewriting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "window"])
def test_frames_committed_again_replace_what_was_there(name: str) -> None:
    first, again = small_state(POLICIES[name]()), small_state(POLICIES[name]())
    for chunk in range(4):
        commit(first, chunk, seed=900 + chunk if chunk == 3 else None)
        commit(again, chunk)
    denoise(again, 4)  # leaves working copies behind
    again.rewrite(3 * CHUNK)
    forward(again, replace(LOOP.commit_pass(3 * CHUNK), kind=PassKind.REWRITE), 903)
    again.end_pass()
    assert saved_equal(first.state_dict(), again.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(denoise(first, 4), denoise(again, 4), strict=True))


def test_merged_frames_cannot_be_rewritten_and_the_cache_stays() -> None:
    state = small_state(TempCache(budget_frames=8))
    for chunk in range(6):
        commit(state, chunk)
    before = state.state_dict()
    with pytest.raises(ValueError, match="cannot be rewritten"):
        state.rewrite(4)
    assert saved_equal(state.state_dict(), before)


# -- recorders and cross-attention -----------------------------------------------------------------------------------


class Events:
    def __init__(self) -> None:
        self.seen: list[AttendEvent] = []

    def on_attend(self, event: AttendEvent) -> None:
        self.seen.append(event)


def test_recorders_see_every_call_as_it_was_executed() -> None:
    events = Events()
    state = small_state(TempCache(budget_frames=8), recorders=[events])
    for chunk in range(6):
        commit(state, chunk)
    outs = denoise(state, 6)
    state.begin_pass(LOOP.commit_pass(12))
    text = state.attend("text", 0, *qkv(1, 5))
    image = state.attend("image", 1, *qkv(2, 4))
    state.abort_pass()
    assert [(e.stream, e.layer) for e in events.seen] == [("self", 0), ("self", 1)] * 7 + [
        ("text", 0),
        ("image", 1),
    ]
    assert [e.context.first_frame for e in events.seen[:12:2]] == [0, 2, 4, 6, 8, 10]
    for event, out in zip(events.seen[12:], [*outs, text, image], strict=True):
        assert torch.equal(event.out, out) and event.candidates == event.k.shape[2]
        again, _ = engines.attend(
            event.q, event.k, event.v, log_count=event.log_count, plan=event.plan, engine="reference"
        )
        torch.testing.assert_close(event.out, again, rtol=0, atol=1e-5)
    assert events.seen[12].log_count is not None and events.seen[14].log_count is None


class Sign(Bucketizer):
    """Two buckets: the sign of the first coordinate."""

    def buckets(self, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (queries[..., 0] > 0).long(), (keys[..., 0] > 0).long()


def test_annca_drops_prompt_tokens_that_no_query_meets_in_sparse_steps() -> None:
    events = Events()
    state = small_state(DenseCache(), cross_selector=AnnCA(bucketizer=Sign()), recorders=[events])
    q, (_, k, v) = qkv(0)[0], qkv(1, 9)
    q[..., 0] = q[..., 0].abs()  # every query is in bucket 1
    keep = k[..., 0] > 0
    steps = list(LOOP.denoise_passes(0))
    for context in (steps[0], steps[3]):
        state.begin_pass(context)
        state.attend("text", 0, q, k, v)
        state.end_pass()
    dense, sparse = events.seen
    assert torch.equal(dense.k, k) and sparse.candidates == 9
    assert sparse.k.shape[2] == int(keep.sum(-1).max()) < 9
    logits = (q @ k.mT / DIM**0.5).masked_fill(~keep[:, :, None], -torch.inf)
    torch.testing.assert_close(sparse.out, logits.softmax(-1) @ v, rtol=0, atol=1e-5)
    assert (dense.out - sparse.out).abs().max() > 1e-2
