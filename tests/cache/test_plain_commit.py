"""What a commit of TempCache merges, and into what: exact duplicates, conserved mass, the keys and values that stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar import cache
from fastar.cache import Staged
from fastar.cache.moments import expand_moment

from .worlds import (
    BATCH,
    DIM,
    FLOAT,
    HEADS,
    ROPE,
    TOKENS,
    attention,
    bound,
    commit,
    fill,
    scene_chunks,
    staged,
)

VARIANTS = {
    "default": {},
    "last": {"key": "last"},
    "medoid": {"key": "medoid"},
    "value_aware": {"value": "value_aware"},
    "last_value": {"value": "last"},
    "shared": {"per_head": False},
    "cosine": {"similarity": "cosine"},
    "dot_diagonal": {"similarity": "dot", "moment": "diagonal"},
    "ward": {"weighting": "ward", "rounds": 1},
    "regions": {"sink_frames": 1, "recent_frames": 1},
}


def duplicates(seed: int, pool: int, frames: int) -> list[Staged]:
    """Chunks of two frames whose tokens are drawn, without repeats in a frame, from `pool` fixed (roped key, value)s.

    Group sizes are whatever the draw makes them. All heads draw alike, as heads that share their groups need.
    """
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, BATCH, HEADS, pool, DIM, generator=generator)
    chunks = []
    for first in range(0, frames, 2):
        pick = torch.cat([torch.randperm(pool, generator=generator)[:TOKENS] for _ in range(2)])
        chunk = staged(
            torch.randn(BATCH, HEADS, 2 * TOKENS, DIM, generator=generator),
            k[:, :, pick],
            v[:, :, pick],
            first,
        )
        chunk.k, chunk.k_raw = k[:, :, pick], ROPE.unrotate(k[:, :, pick], chunk.positions)
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("name", list(VARIANTS))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16), pool=st.integers(TOKENS, 3 * TOKENS))
def test_merging_exact_duplicates_changes_nothing(name: str, seed: int, pool: int) -> None:
    policy = bound(cache.TempCache(budget_frames=16, **FLOAT, **VARIANTS[name]), layers=1)
    dense = bound(cache.DenseCache(**FLOAT), layers=1)
    for chunk in duplicates(seed, pool, 30):
        commit(policy, chunk)
        commit(dense, chunk)
    assert policy.slots_used() < dense.slots_used() / 3
    q = 2 * torch.randn(BATCH, HEADS, 9, DIM, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        attention(q, policy.view(0)), attention(q, dense.view(0)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_token_is_counted_once(name: str) -> None:
    policy = bound(cache.TempCache(budget_frames=12, **VARIANTS[name]))
    for number in range(15):
        fill(policy, 1, start=number)
        log_count = policy.view(1).log_count
        if log_count is not None:
            total = log_count.double().exp().sum(-1)
            assert (total - (number + 1) * 2 * TOKENS).abs().max() < 1e-3
    assert log_count is not None and log_count.max() > 0


@pytest.mark.parametrize("name", list(VARIANTS))
def test_merged_values_keep_the_mean_of_the_past(name: str) -> None:
    if "value" in VARIANTS[name]:
        pytest.skip("weights by attention or by age, not by count")
    policy, dense = (
        bound(p)
        for p in (cache.TempCache(budget_frames=12, **FLOAT, **VARIANTS[name]), cache.DenseCache(**FLOAT))
    )
    for each in (policy, dense):
        fill(each, 12)
    view = policy.view(0)
    weight = view.log_count.exp()[..., None]
    mean = (view.v * weight).sum(2) / weight.sum(2)
    torch.testing.assert_close(mean, dense.view(0).v.mean(2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_running_moment_is_the_mean_over_all_queries(kind: str) -> None:
    policy = bound(cache.TempCache(budget_frames=12, moment=kind, match_space="raw"), layers=1)
    chunks = scene_chunks(7)
    for chunk in chunks:
        commit(policy, chunk)
    q = torch.cat([c.q_raw for c in chunks], 2)
    expected = q.mT @ q / q.shape[2]
    found = expand_moment(policy._extras[0]["moment"], policy.moment, DIM)
    if kind == "diagonal":
        expected = expected.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)  # kept in bfloat16


def test_the_key_that_stays_is_the_one_asked_for() -> None:
    views = {}
    for key in ("last", "medoid", "mean"):
        policy = bound(cache.TempCache(budget_frames=12, key=key, **FLOAT))
        history = fill(policy, 12)
        every = torch.cat([c.k for c in history], 2)
        positions = torch.cat([c.positions for c in history])
        views[key] = view = policy.view(0)
        same = (view.k[:, :, :, None] == every[:, :, None]).all(-1)  # [B, H, S, L]
        if key == "mean":
            merged = view.log_count > 0
            assert not same.any(-1)[merged].any() and same.any(-1)[~merged].all()
        else:  # an original key, at its original position
            assert same.any(-1).all()
            assert torch.equal(view.positions, positions[same.int().argmax(-1)])
    frames = {key: view.positions[..., 0].float().mean() for key, view in views.items()}
    assert frames["last"] > frames["medoid"]


def test_the_value_that_stays_is_the_newest_if_that_is_asked_for() -> None:
    policy = bound(cache.TempCache(budget_frames=12, value="last", **FLOAT))
    history = fill(policy, 12)
    values, positions = torch.cat([c.v for c in history], 2), torch.cat([c.positions for c in history])
    view = policy.view(0)
    newest = (view.positions[:, :, :, None] == positions).all(-1).int().argmax(-1)
    assert (view.log_count > 0).any()
    assert torch.equal(view.v, values.gather(2, newest[..., None].expand_as(view.v)))


def test_raw_matching_merges_what_moved_and_roped_matching_does_not_want_to() -> None:
    """One object that walks through the picture: equal raw keys, different positions."""
    chunks = scene_chunks(1, places=1, noise=0.0)
    k = chunks[0].k_raw[:, :, :1].repeat(1, 1, 2 * TOKENS, 1)
    other = torch.randn(BATCH, HEADS, 2 * TOKENS, DIM)
    walker = torch.arange(2 * TOKENS) % TOKENS
    spread = {}
    for space in ("raw", "roped"):
        policy = bound(
            cache.TempCache(budget_frames=12, match_space=space, value_weight=0.0, key="last"), layers=1
        )
        for number in range(12):
            here = walker == number % TOKENS
            keys = torch.where(here[:, None], k, torch.randn_like(other))
            commit(policy, staged(other, keys, keys, 2 * number))
        raw = ROPE.unrotate(policy.view(0).k, policy.view(0).positions)
        near = torch.cdist(raw, k[:, :, :1])[..., 0] < 0.1
        spread[space] = near.sum()
    assert spread["raw"] < spread["roped"]


def test_shared_heads_merge_the_same_slots_and_spend_less_on_metadata() -> None:
    shared = bound(cache.TempCache(budget_frames=12, per_head=False))
    single = bound(cache.TempCache(budget_frames=12))
    for policy in (shared, single):
        fill(policy, 10)
    positions, counts = shared.view(0).positions, shared.view(0).log_count
    assert torch.equal(positions[:, 0], positions[:, 1]) and torch.equal(counts[:, 0], counts[:, 1])
    assert not torch.equal(positions[0], positions[1])  # batch elements choose for themselves
    own = single.view(0).log_count
    assert not torch.equal(own[:, 0], own[:, 1])
    assert shared.slot_bytes() < single.slot_bytes()
