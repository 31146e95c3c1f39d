"""TempCache under a budget: regions, quality against controls, matchers, quantised slots, what is configured."""

import pytest
import torch

from fastar import ann, cache
from fastar.cache import Staged

from .worlds import (
    BATCH,
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
    views_equal,
)


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
