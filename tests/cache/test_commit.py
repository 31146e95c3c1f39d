"""What a commit costs: memory that it allocates and holds, waits for the device; and that it is done in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import ann, cache
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.cache import CacheSpec, Staged
from fastar.cache.change import Change, Edit, Joined, Prepared, Scratch
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import Slots
from fastar.sparsity import AnnSA, Selector
from tests.dispatch import Watched
from tests.small import CHUNK, LAYERS, small_loop, small_state

GRID, DIM, HEADS, FRAMES = (6, 8), 32, 2, 3  # frames of a chunk


def filled(policy: SlotPolicy, chunks: int = 9) -> SlotPolicy:
    """After `chunks` commits, with one more staged."""
    rope, tokens = RotaryEmbedding(DIM), GRID[0] * GRID[1]
    policy.bind(
        CacheSpec(
            num_layers=2, batch=1, num_heads=HEADS, head_dim=DIM, tokens_per_frame=tokens, rope=rope,
            compute_dtype=torch.bfloat16, device=torch.device("cpu"), chunk_frames=FRAMES,
        )
    )  # fmt: skip
    for chunk in range(chunks + 1):
        positions = grid_positions(FRAMES * chunk, FRAMES, GRID)
        for layer in range(2):
            q, k, v = torch.randn(3, 1, HEADS, FRAMES * tokens, DIM).bfloat16()
            policy.stage(layer, Staged(q, k, rope.rotate(k, positions), v, positions))
        if chunk < chunks:
            policy.commit(FRAMES * chunk, FRAMES)
    return policy


def memory_of(*held: Any) -> dict[int, int]:
    """Bytes of every tensor's memory, by its identity, in objects of any depth."""
    found: dict[int, int] = {}
    for each in held:
        if isinstance(each, Tensor):
            found[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            found |= memory_of(*each.values())
        elif isinstance(each, list | tuple):
            found |= memory_of(*each)
        elif hasattr(each, "__dict__"):
            found |= memory_of(vars(each))
    return found


# Most that is allocated on the way, and held between the two halves of a commit, in bytes of the full cache (18 frames,
# of which 3 arrive). When every layer's slots were made anew it was 2.5, 3.9, 80, 64 and 152, and 1.
COSTS: dict[str, tuple[Callable[[], SlotPolicy], float, float]] = {
    "window": (lambda: cache.WindowCache(budget_frames=18), 0.5, 0.35),
    "random": (lambda: cache.RandomCache(budget_frames=18), 1.9, 0.35),
    "tempcache": (lambda: cache.TempCache(budget_frames=18), 45, 0.55),
    "tempcache_last": (lambda: cache.TempCache(budget_frames=18, key="last"), 38, 0.46),
    "tempcache_int8": (lambda: cache.TempCache(budget_frames=9, slot_bits=8), 90, 0.85),
}


@pytest.mark.parametrize("name", list(COSTS))
def test_a_commit_holds_no_second_cache_and_writes_without_allocating(name: str) -> None:
    make, allocated, held = COSTS[name]
    policy = filled(make())
    size = policy.bytes_used()
    at = [tensor.data_ptr() for buffer in policy._buffers for tensor in buffer.fields.values()]
    before = memory_of([buffer.fields for buffer in policy._buffers], policy._staged, policy._extras)
    with Watched() as first:
        prepared = policy.prepare(9 * FRAMES, FRAMES)
    kept = {key: n for key, n in memory_of(prepared).items() if key not in before}
    with Watched() as second:
        policy.finish(prepared, 9 * FRAMES, FRAMES)
    assert second.bytes == 0
    assert first.bytes <= allocated * size and sum(kept.values()) <= held * size
    assert not first.waiting and not second.waiting
    assert at == [tensor.data_ptr() for buffer in policy._buffers for tensor in buffer.fields.values()]


@pytest.mark.parametrize("scratch", [2**26, 200])
@pytest.mark.parametrize("shared", [False, True])
def test_an_edit_in_place_is_the_change_done_aside(
    scratch: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastar.cache.change._SCRATCH_BYTES", scratch)  # 200: a few slots at a time
    heads = 1 if shared else 3

    def slots(size: int) -> Slots:
        metadata = {name: torch.rand(2, heads, size) for name in ("count", "mark")}
        return Slots({"key": torch.randn(2, 3, size, 4), **metadata})

    filled, arrived, first, left = 23, 5, 4, 7
    buffer, new = slots(30), slots(arrived)
    joined = Joined(buffer.narrow(0, filled), new)
    assert joined.size == 28 and torch.equal(joined.narrow(20, 26)["key"], joined["key"][:, :, 20:26])
    order = torch.rand(2, heads, filled - first).argsort(-1) + first
    old, place = order[..., left:].sort(-1).values, order[..., : left + 2]  # two that stay are written too
    keep = torch.cat([old, torch.arange(filled, 28).expand(2, heads, -1)], -1)
    rows = {"key": torch.randn(2, 3, left + 2, 4), "count": torch.rand(2, heads, left + 2)}
    change = Change(joined, keep, first, place, rows, {"mark": torch.rand(2, heads, 28 - left)})
    expected = change.done()
    for b in range(2):  # by hand
        for h in range(3):
            g = h % heads
            key = joined["key"][b, h].clone()
            key[place[b, g]] = rows["key"][b, h]
            assert torch.equal(expected["key"][b, h], torch.cat([key[:first], key[keep[b, g]]]))
    edit = Edit(change, buffer, Scratch())
    edit.apply(buffer)
    assert edit.size == expected.size == 21
    for name, tensor in expected.fields.items():
        assert torch.equal(buffer.narrow(0, 21)[name], tensor)


def test_layers_change_only_in_the_second_half_of_a_commit() -> None:
    policy = filled(cache.TempCache(budget_frames=18))
    before = policy.state_dict()
    prepared: Prepared = policy.prepare(9 * FRAMES, FRAMES)
    assert all(isinstance(change, Edit) for change, _ in prepared)
    for name, x in policy.state_dict().items():
        assert torch.equal(before[name], x) if isinstance(x, Tensor) else before[name] == x
    policy.finish(prepared, 9 * FRAMES, FRAMES)
    after = policy.state_dict()
    assert after["next_frame"] == 10 * FRAMES
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith(".key"))


POLICIES: dict[str, Callable[[], SlotPolicy]] = {
    "dense": cache.DenseCache,
    "window": lambda: cache.WindowCache(budget_frames=6),
    "random": lambda: cache.RandomCache(budget_frames=8),
    "key_norm": lambda: cache.KeyNormCache(budget_frames=8),
    "tempcache": lambda: cache.TempCache(budget_frames=8),
    "tempcache_shared": lambda: cache.TempCache(
        budget_frames=8, per_head=False, key="medoid", match_space="raw"
    ),
    "tempcache_int4": lambda: cache.TempCache(budget_frames=8, slot_bits=4),
    "tempcache_lsh": lambda: cache.TempCache(budget_frames=8, matcher=ann.LSHMatcher()),
}


@pytest.mark.parametrize("name", list(POLICIES))
def test_no_pass_or_commit_after_the_first_would_wait_for_a_gpu(name: str) -> None:
    passes_without_waiting(POLICIES[name](), None)


# not k-means: torch.nn.functional.one_hot checks its numbers where they are on the CPU
@pytest.mark.parametrize("bucketizer", [ann.LSHBucketizer(), ann.QuantizedBucketizer()])
def test_neither_would_a_sparse_one(bucketizer: ann.Bucketizer) -> None:
    passes_without_waiting(cache.TempCache(budget_frames=8), AnnSA(bucketizer=bucketizer))


def passes_without_waiting(policy: SlotPolicy, selector: Selector | None) -> None:
    state, loop = small_state(policy, selector), small_loop()
    tokens = CHUNK * state.grid[0] * state.grid[1]
    for chunk in range(7):
        for context in [*loop.denoise_passes(chunk * CHUNK), loop.commit_pass(chunk * CHUNK)]:
            with Watched() as watched:
                state.begin_pass(context)
                for layer in range(LAYERS):
                    state.attend("self", layer, *torch.randn(3, 1, state.cache.spec.num_heads, tokens, 16))
                state.end_pass()
            assert chunk == 0 or not watched.waiting, watched.waiting


def test_the_watch_sees_what_would_wait() -> None:
    x = torch.randn(6)
    waits: list[Callable[[], Any]] = [
        x.tolist, x.nonzero, x.unique, x.sum().item, lambda: bool(x[0] > 0), lambda: x[x > 0],
        lambda: torch.tensor([1.0]), lambda: torch.equal(x, x),
    ]  # fmt: skip
    for wait in waits:
        with Watched() as watched:
            wait()
        assert watched.waiting
    with Watched() as watched:
        y = x.clone()
        y.mul_(2)[2:].add_(1)
        torch.index_select(x, 0, torch.arange(6), out=y)
    assert not watched.waiting and watched.bytes == x.nbytes + 6 * 8
