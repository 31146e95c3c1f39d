"""One rollout's attention state: passes are atomic, denoising leaves no trace, every call is seen by the recorders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann.base import Bucketizer
from fastar.attention.context import PassKind
from fastar.attention.events import AttendEvent
from fastar.attention.state import AttentionState
from fastar.cache import DenseCache, TempCache
from fastar.sparsity import AnnCA
from tests.attention.passes import LOOP, POLICIES, commit, denoise, forward, qkv
from tests.small import CHUNK, DIM, GRID, HEADS, LAYERS, small_state


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
