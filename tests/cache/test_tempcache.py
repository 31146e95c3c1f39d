"""TempCache under a budget: exactness on duplicates, regions, conserved mass, quality against controls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar import ann, cache
from fastar.cache import Staged
from fastar.cache.moments import expand_moment

from .worlds import (
    BATCH,
    DIM,
    FLOAT,
    GRID,
    HEADS,
    ROPE,
    TOKENS,
    attention,
    bound,
    commit,
    fill,
    scene_chunks,
    staged,
    views_equal,
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


def test_frames_rewritten_before_the_cache_is_full_leave_no_trace() -> None:
    plain, rewritten = (bound(cache.TempCache(budget_frames=16)) for _ in range(2))
    fill(plain, 12)
    fill(rewritten, 6)
    rewritten.drop_from(6)
    fill(rewritten, 9, start=3)
    assert (
        views_equal(plain.view(0), rewritten.view(0)) is False
    )  # the queries of the first try were seen twice
    for policy in (plain, rewritten):
        total = policy.view(0).log_count.double().exp().sum(-1)
        assert (total - 24 * TOKENS).abs().max() < 1e-3
        partner = policy._buffers[0]["partner"]
        assert (partner < policy.filled).all()


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


def test_sink_and_recent_frames_stay_exact() -> None:
    policy = bound(cache.TempCache(budget_frames=14, sink_frames=1, recent_frames=2, **FLOAT))
    history = fill(policy, 15)
    k, v = (torch.cat([getattr(c, name) for c in history], 2) for name in ("k", "v"))
    view = policy.view(0)
    for part in (slice(0, TOKENS), slice(-2 * TOKENS, None)):
        assert torch.equal(view.k[:, :, part], k[:, :, part]) and torch.equal(
            view.v[:, :, part], v[:, :, part]
        )
        assert (view.log_count[:, :, part] == 0).all()
    assert (view.log_count[:, :, TOKENS : -2 * TOKENS] > 0).any()


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


def errors(policies: dict[str, cache.CachePolicy], chunks: list[Staged]) -> dict[str, float]:
    """Relative error of the attention output against dense, for queries of every place, after all chunks."""
    dense = bound(cache.DenseCache(**FLOAT), layers=1)
    for chunk in chunks:
        for policy in (dense, *policies.values()):
            commit(policy, chunk)
    now = 2 * len(chunks)
    found = dict.fromkeys(policies, 0.0)
    for chunk in chunks[-6:]:
        positions = (
            chunk.positions + torch.tensor([now, 0, 0]) - torch.tensor([int(chunk.positions[0, 0]), 0, 0])
        )
        q = ROPE.rotate(chunk.q_raw, positions)
        expected = attention(q, dense.view(0))
        for name, policy in policies.items():
            out = attention(q, policy.view(0))
            found[name] += float((out - expected).norm() / expected.norm()) / 6
    return found


def test_merging_loses_less_than_evicting_what_returns() -> None:
    budget = {"budget_frames": 13}
    policies = {
        "tempcache": bound(cache.TempCache(**budget), layers=1),
        "int8": bound(cache.TempCache(slot_bits=8, **budget), layers=1),
        "no_log": bound(cache.TempCache(log_count=False, **budget), layers=1),
        "random": bound(cache.RandomCache(recent_frames=1, **budget), layers=1),
        "uniform": bound(cache.RandomCache(recent_frames=1, fading=False, **budget), layers=1),
        "window": bound(cache.WindowCache(**budget), layers=1),
        "key_norm": bound(cache.KeyNormCache(recent_frames=1, **budget), layers=1),
    }
    found = errors(policies, scene_chunks(36))
    controls = min(found[name] for name in ("random", "uniform", "window", "key_norm"))
    assert found["tempcache"] < 0.6 * controls
    assert found["int8"] < found["tempcache"]
    assert found["no_log"] > found["tempcache"]


def test_a_matcher_that_misses_still_keeps_the_budget() -> None:
    coarse = ann.LSHMatcher(bits=12, tables=1, radius=0)  # finds next to nothing
    policy = bound(cache.TempCache(budget_frames=12, matcher=coarse))
    fill(policy, 15)
    assert policy.slots_used() == policy.capacity_slots()
    fine = ann.LSHMatcher()
    chunks = scene_chunks(24)
    policies = {
        "exact": bound(cache.TempCache(budget_frames=14), layers=1),
        "lsh": bound(cache.TempCache(budget_frames=14, matcher=fine), layers=1),
        "quantized": bound(cache.TempCache(budget_frames=14, matcher=ann.QuantizedMatcher()), layers=1),
        "window": bound(cache.WindowCache(budget_frames=14), layers=1),
    }
    found = errors(policies, chunks)
    assert max(found["lsh"], found["quantized"]) < 1.5 * found["exact"] < found["window"]


def test_faiss_and_exact_search_merge_alike() -> None:
    pytest.importorskip("faiss")
    a, b = (
        bound(cache.TempCache(budget_frames=12, matcher=m)) for m in (ann.ExactMatcher(), ann.FaissMatcher())
    )
    for policy in (a, b):
        fill(policy, 9)
    assert torch.equal(a.view(0).positions, b.view(0).positions)


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    views = []
    for _ in range(2):
        policy = cache.TempCache(budget_frames=12)
        bound(policy, layers=1, device=device)
        for chunk in scene_chunks(14):
            moved = [x.to(device) for x in (chunk.q_raw, chunk.k_raw, chunk.k, chunk.v)]
            commit(policy, Staged(*moved, positions=chunk.positions.to(device)))
        views.append(policy.view(0))
    assert views_equal(*views)


@pytest.mark.parametrize("bits", [8, 4])
def test_slots_that_do_not_merge_are_not_rounded_again(bits: int) -> None:
    policy = bound(cache.TempCache(budget_frames=14, slot_bits=bits, recent_frames=2))
    fill(policy, 12)
    before = (
        policy._buffers[0]
        .narrow(policy.filled - 2 * TOKENS, policy.filled)
        .gather(torch.arange(2 * TOKENS)[None, None])
    )
    fill(policy, 1, start=12)
    slots = policy._buffers[0].narrow(0, policy.filled)
    untouched = (slots["count"] == 1) & (slots["position"] >= before["position"].min())
    assert untouched.any()
    for b in range(BATCH):
        for h in range(HEADS):
            for slot in untouched[b, h].nonzero().flatten().tolist():
                same = (before["position"][b, h] == slots["position"][b, h, slot]).nonzero().flatten()
                for old in same.tolist():
                    for name in ("key", "value", "key_step", "value_low"):
                        assert torch.equal(slots[name][b, h, slot], before[name][b, h, old])


def test_configured_caches_and_matchers(composed) -> None:  # type: ignore[no-untyped-def]
    from hydra.utils import instantiate

    names = ["dense", "window", "sink_recent", "random", "key_norm", "int4_window", "empty", "tempcache",
             "tempcache_paper", "tempcache_int8", "tempcache_int4", "tempcache_fast"]  # fmt: skip
    for name in names:
        policy = instantiate(composed(f"cache/{name}").cache)
        assert isinstance(policy, cache.CachePolicy), name
    for name, kind in {
        "exact": ann.ExactMatcher,
        "lsh": ann.LSHMatcher,
        "quantized": ann.QuantizedMatcher,
    }.items():
        for form in ("tempcache", "tempcache_paper", "tempcache_int8"):
            policy = instantiate(composed(f"cache/{form}", f"ann@cache.matcher={name}").cache)
            assert type(policy.matcher) is kind
    assert instantiate(composed("cache/tempcache_int4").cache)._format.bits == 4
    assert instantiate(composed("cache/tempcache", "cache.budget_share=null", "cache.budget_frames=9").cache)
    assert GRID[0] * GRID[1] == TOKENS


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_the_newest_share_of_the_slots_stays_exact(share: float) -> None:
    policy = bound(cache.TempCache(budget_frames=20, recent_share=share, **FLOAT), chunk_frames=2)
    history = fill(policy, 20)
    kept = policy.verbatim_slots()
    assert kept % (2 * TOKENS) == 0 and kept <= share * policy.capacity_slots()
    assert kept > share * policy.capacity_slots() - 2 * TOKENS or share == 0.99
    view = policy.view(0)
    truth = torch.cat([chunk.k for chunk in history], dim=2)
    if kept:
        assert torch.equal(view.k[:, :, -kept:], truth[:, :, -kept:])
    assert not torch.equal(view.k[:, :, -kept - 8 * TOKENS :], truth[:, :, -kept - 8 * TOKENS :])


def test_a_recent_share_is_a_share() -> None:
    with pytest.raises(ValueError, match="recent_share must be at least 0 and below 1, got 1"):
        cache.TempCache(budget_frames=9, recent_share=1)
