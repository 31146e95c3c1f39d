"""What every cache policy promises: exactness with room, bounds without, atomicity, determinism, saved state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar import cache

from . import worlds
from .worlds import BOUNDED, FLOAT, LAYERS, TOKENS, UNBOUNDED, bound, fill, random_chunk, views_equal


@pytest.mark.parametrize("name", [*BOUNDED, "paper"])
def test_with_room_for_everything_any_policy_is_dense_bit_for_bit(name: str) -> None:
    dense = bound(cache.DenseCache(**FLOAT))
    policy = bound(BOUNDED[name](budget_frames=60, **FLOAT) if name in BOUNDED else UNBOUNDED[name](**FLOAT))
    for each in (dense, policy):
        fill(each, 7, first=5)
    for layer in range(LAYERS):
        expected, view = dense.view(layer), policy.view(layer)
        assert torch.equal(view.k, expected.k) and torch.equal(view.v, expected.v)
        assert torch.equal(view.positions, expected.positions)
        assert view.log_count is None or (view.log_count == 0).all()
    assert policy.slots_used() == 14 * TOKENS


def test_dense_keeps_the_staged_tokens_in_order() -> None:
    policy = bound(cache.DenseCache(**FLOAT))
    history = fill(policy, 5)
    view = policy.view(0)
    assert torch.equal(view.k, torch.cat([c.k for c in history], 2))
    assert torch.equal(view.v, torch.cat([c.v for c in history], 2))
    assert torch.equal(view.positions[1, 0], torch.cat([c.positions for c in history]))
    assert policy.bytes_used() == 10 * policy.spec.dense_frame_bytes * 2 + LAYERS * 10 * TOKENS * 4
    assert policy.capacity_bytes() is None


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", list(BOUNDED))
def test_bytes_reach_a_constant_below_the_budget(name: str, bits: int) -> None:
    policy = bound(BOUNDED[name](budget_frames=12, slot_bits=bits))
    seen = []
    for number in range(40):
        fill(policy, 1, start=number)
        kept = [t for buffer in policy._buffers for t in buffer.narrow(0, policy.filled).fields.values()]
        kept += [t for extras in policy._extras for t in extras.values()]
        assert policy.bytes_used() == sum(t.numel() * t.element_size() for t in kept)
        assert policy.bytes_used() <= policy.capacity_bytes() <= policy.total_budget()
        seen.append(policy.bytes_used())
    assert len(set(seen[-10:])) == 1 and seen[-1] == policy.capacity_bytes()
    assert policy.total_budget() - policy.capacity_bytes() < LAYERS * policy.slot_bytes()  # none wasted
    assert policy.working_bytes() == 0
    assert policy.view(0).k.shape[2] == policy.slots_used() == policy.capacity_slots()


@pytest.mark.parametrize("name", list(BOUNDED))
def test_quantised_slots_hold_more_tokens_in_the_same_bytes(name: str) -> None:
    slots = [bound(BOUNDED[name](budget_frames=40, slot_bits=b)).capacity_slots() for b in (16, 8, 4)]
    assert slots[0] < slots[1] < slots[2]


@pytest.mark.parametrize("name", list(BOUNDED) + list(UNBOUNDED))
@pytest.mark.parametrize("bits", [16, 4])
def test_saved_and_restored_continues_with_the_same_bits(name: str, bits: int) -> None:
    def make() -> cache.CachePolicy:
        options = {"slot_bits": bits, **({"budget_frames": 12} if name in BOUNDED else {"threshold": 0.3})}
        if name == "dense":
            options.pop("threshold")
        return bound((BOUNDED | UNBOUNDED)[name](**options))

    through, first, second = make(), make(), make()
    fill(through, 9, first=3)
    fill(first, 5, first=3)
    saved = first.state_dict()
    fill(first, 1, start=5, first=3)  # what is saved is a copy
    second.stage(0, random_chunk(99, 13))  # what was staged before a restore is forgotten
    second.load_state_dict(saved)
    fill(second, 4, start=5, first=3)
    for layer in range(LAYERS):
        assert views_equal(through.view(layer), second.view(layer))
    a, b = through.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_saved_cache_of_other_settings_is_refused() -> None:
    saved = fill_and_save(cache.WindowCache(budget_frames=12))
    with pytest.raises(ValueError, match="other settings"):
        bound(cache.TempCache(budget_frames=12)).load_state_dict(saved)
    with pytest.raises(ValueError, match="other settings"):
        bound(cache.WindowCache(budget_frames=12, slot_bits=8)).load_state_dict(saved)
    with pytest.raises(ValueError, match="budget holds"):
        bound(cache.WindowCache(budget_frames=9)).load_state_dict(saved)


def fill_and_save(policy: cache.CachePolicy) -> dict:
    fill(bound(policy), 8)
    return policy.state_dict()


@pytest.mark.parametrize("name", list(BOUNDED))
def test_a_commit_is_all_layers_or_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = bound(BOUNDED[name](budget_frames=12))
    fill(policy, 8)
    before = policy.state_dict()
    absorb = type(policy).absorb

    def fails_late(self, layer, *args):  # type: ignore[no-untyped-def]
        if layer == LAYERS - 1:
            raise RuntimeError("out of memory")
        return absorb(self, layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(policy), "absorb", fails_late)
        with pytest.raises(RuntimeError):
            fill(policy, 1, start=8)
    after = policy.state_dict()
    assert all(
        torch.equal(before[k], after[k]) if torch.is_tensor(before[k]) else before[k] == after[k]
        for k in before
    )
    policy.discard()
    with pytest.raises(ValueError, match="missing: \\[0, 1\\]"):
        policy.commit(16, 2)
    fill(policy, 1, start=8)  # and it goes on


@pytest.mark.parametrize("name", list(BOUNDED))
@settings(max_examples=8, deadline=None)
@given(frames=st.integers(1, 9), at=st.integers(0, 20000))
def test_a_prefill_at_once_equals_one_chunk_at_a_time(name: str, frames: int, at: int) -> None:
    whole, parts = (bound(BOUNDED[name](budget_frames=12)) for _ in range(2))
    total = 12 + frames
    long = [random_chunk(7 + layer, at, total) for layer in range(LAYERS)]
    for layer, chunk in enumerate(long):
        whole.stage(layer, chunk)
    whole.commit(at, total)
    step = whole.spec.chunk_frames
    for first in range(0, total, step):
        some = slice(first * TOKENS, (first + step) * TOKENS)
        for layer, chunk in enumerate(long):
            cut = [x[:, :, some] for x in (chunk.q_raw, chunk.k_raw, chunk.k, chunk.v)]
            parts.stage(layer, cache.Staged(*cut, positions=chunk.positions[some]))
        parts.commit(at + first, min(step, total - first))
    assert all(views_equal(whole.view(layer), parts.view(layer)) for layer in range(LAYERS))


def test_window_and_sink_keep_what_they_say() -> None:
    window = bound(cache.WindowCache(budget_frames=12, **FLOAT))
    sink = bound(cache.WindowCache(budget_frames=12, sink_frames=1, **FLOAT))
    every = torch.cat([c.k for c in fill(window, 10)], 2)
    fill(sink, 10)
    slots = window.capacity_slots()
    assert torch.equal(window.view(0).k, every[:, :, -slots:])
    expected = torch.cat([every[:, :, :TOKENS], every[:, :, TOKENS - slots :]], 2)
    assert torch.equal(sink.view(0).k, expected)


def test_random_keeps_the_newest_and_a_fair_sample_of_the_rest() -> None:
    fading = bound(cache.RandomCache(budget_frames=20))
    uniform = bound(cache.RandomCache(budget_frames=20, fading=False))
    other = bound(cache.RandomCache(budget_frames=20, seed=1))
    for policy in (fading, uniform, other):
        fill(policy, 40)
        frames = policy.view(0).positions[..., 0]
        newest = frames >= 76
        assert (newest.sum(-1) == 4 * TOKENS).all()
        pairs = policy.view(0).positions[0, 0].tolist()
        assert len({tuple(p) for p in pairs}) == len(pairs)  # no token twice
    ages = [policy.view(0).positions[..., 0].float().mean() for policy in (fading, uniform)]
    assert ages[0] > ages[1] + 8  # fading forgets the old
    old = uniform.view(0).positions[..., 0]
    old = old[old < 76].float()
    assert abs(old.mean() - 37.5) < 4
    heads = fading.view(0).positions[0]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], fading.view(1).positions[0, 0])
    assert not torch.equal(heads, other.view(0).positions[0])


def test_key_norm_keeps_small_keys_and_the_newest() -> None:
    policy = bound(cache.KeyNormCache(budget_frames=12, recent_frames=2, **FLOAT))
    every = torch.cat([c.k for c in fill(policy, 4, frames=4)], 2)  # 16 frames, of which some go in one step
    kept = policy.view(0)
    assert torch.equal(kept.k[:, :, -2 * TOKENS :], every[:, :, -2 * TOKENS :])
    dropped_norm = every.norm(dim=-1).topk(8, -1).values.mean()
    assert kept.k[:, :, : -2 * TOKENS].norm(dim=-1).amax() < dropped_norm


def test_empty_keeps_nothing() -> None:
    policy = bound(cache.EmptyCache())
    fill(policy, 3)
    view = policy.view(0)
    assert view.k.shape == (worlds.BATCH, worlds.HEADS, 0, worlds.DIM)
    assert view.log_count is None and view.positions is None
    assert policy.bytes_used() == policy.slots_used() == policy.capacity_bytes() == 0


@pytest.mark.parametrize("name", ["dense", "window", "sink_recent", "random", "tempcache_regions"])
def test_recent_frames_can_be_rewritten(name: str) -> None:
    options = {} if name == "dense" else {"budget_frames": 12}
    policy = bound((BOUNDED | UNBOUNDED)[name](**FLOAT, **options))
    fill(policy, 9)
    policy.drop_from(16)
    assert policy.view(0).positions[..., 0].max() == 15
    with pytest.raises(ValueError, match="the next one is 16"):
        fill(policy, 1, start=9)
    policy.discard()
    fresh = random_chunk(123, 16)
    for layer in range(LAYERS):
        policy.stage(layer, fresh)
    policy.commit(16, 2)
    view = policy.view(0)
    assert torch.equal(view.k[:, :, -2 * TOKENS :], fresh.k)
    fill(policy, 4, start=9)
    assert policy.view(0).positions[..., 0].max() == 25


@pytest.mark.parametrize(
    "name", ["window", "random", "tempcache", "tempcache_regions", "tempcache_shared", "paper"]
)
def test_frames_already_merged_or_evicted_cannot_be_rewritten(name: str) -> None:
    policy = bound(BOUNDED[name](budget_frames=12) if name in BOUNDED else UNBOUNDED[name]())
    fill(policy, 12)
    before = policy.view(0).k.clone()
    with pytest.raises(ValueError, match="cannot be rewritten"):
        policy.drop_from(2)
    assert torch.equal(policy.view(0).k, before)
    policy.drop_from(24)  # nothing there yet: nothing to do


@pytest.mark.parametrize(("make", "message"), [
    (lambda: cache.WindowCache(), "exactly one positive budget"),
    (lambda: cache.WindowCache(budget_share=0.1, budget_frames=3), "exactly one positive budget"),
    (lambda: cache.TempCache(budget_share=-0.1), "exactly one positive budget"),
    (lambda: cache.DenseCache(slot_bits=5), "16, 8 or 4"),
    (lambda: cache.DenseCache(storage="int3"), "bfloat16"),
    (lambda: cache.TempCache(budget_frames=9, key="newest"), "last, mean, medoid"),
    (lambda: cache.TempCache(budget_frames=9, similarity="l2"), "expected_logit_change"),
    (lambda: cache.TempCache(budget_frames=9, rounds=0), "at least 1"),
    (lambda: cache.TempCachePaper(similarity="expected_logit_change"), "cosine, centred, dot"),
    (lambda: bound(cache.WindowCache(budget_frames=3)), "at least .* dense frames"),
    (lambda: bound(cache.TempCache(budget_bytes=100)), "one chunk"),
    (lambda: bound(cache.TempCache(budget_frames=12, sink_frames=9, recent_frames=9)), "regions kept exact"),
    (lambda: bound(cache.DenseCache(slot_bits=8, quant_group=5)), "divide head_dim"),
    (lambda: cache.DenseCache().view(0), "bind"),
])  # fmt: skip
def test_bad_settings_are_refused_in_one_sentence(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_refused() -> None:
    policy = bound(cache.DenseCache())
    chunk = random_chunk(0, 0)
    with pytest.raises(ValueError, match="create a new one"):
        policy.bind(worlds.spec())
    with pytest.raises(ValueError, match="outside this cache's 2 layers"):
        policy.stage(2, chunk)
    with pytest.raises(ValueError, match="staged v must be"):
        policy.stage(0, cache.Staged(chunk.q_raw, chunk.k_raw, chunk.k, chunk.v[:, :1], chunk.positions))
    with pytest.raises(ValueError, match="staged positions"):
        policy.stage(0, cache.Staged(chunk.q_raw, chunk.k_raw, chunk.k, chunk.v, chunk.positions[:3]))
    for layer in range(LAYERS):
        policy.stage(layer, chunk)
    with pytest.raises(ValueError, match="3 frames have"):
        policy.commit(0, 3)
    with pytest.raises(ValueError, match="staged positions end at"):
        policy.commit(50, 2)
    policy.commit(0, 2)


def test_a_failed_bind_can_be_repeated_with_other_sizes() -> None:
    policy = cache.WindowCache(budget_bytes=40000)
    with pytest.raises(ValueError, match="one chunk"):
        policy.bind(worlds.spec(tokens_per_frame=600))
    assert not policy.is_bound
    policy.bind(worlds.spec())
    fill(policy, 2)


def test_gradients_are_not_kept() -> None:
    policy = bound(cache.TempCache(budget_frames=12))
    for layer in range(LAYERS):
        chunk = random_chunk(layer, 0)
        chunk.k.requires_grad_()
        policy.stage(layer, chunk)
    policy.commit(0, 2)
    assert not policy.view(0).k.requires_grad
