"""Rollouts whose attention reads 8- and 4-bit slots as they are stored: the same results, and no copy of the cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastar.ann import LSHBucketizer
from fastar.attention.events import AttendEvent
from fastar.attention.reading import reading_of
from fastar.attention.rope import RotaryEmbedding
from fastar.attention.state import AttentionState
from fastar.cache import (
    CachePolicy,
    DenseCache,
    HeadErrors,
    HeadwiseCache,
    StockWindow,
    TempCache,
    WindowCache,
)
from fastar.cache.base import CacheSpec, StoredView
from fastar.sparsity import AnnSA, Dense, DenseCross, Selector
from tests.engines.test_engines import TOLERANCE, relative_error
from tests.rollout.test_capture import rollout_of, video
from tests.small import (
    CHUNK,
    DIM,
    GRID,
    HEADS,
    LAYERS,
    run,
    small_backbone,
    small_loop,
    small_rollout,
    text_backbone,
)

PACKED: dict[str, Callable[..., CachePolicy]] = {
    "int4 window": partial(WindowCache, budget_frames=2, slot_bits=4, sink_frames=1),
    "int8 tempcache": partial(TempCache, budget_frames=6, slot_bits=8, quant_group=8),
    "int4 tempcache": partial(TempCache, budget_frames=4, slot_bits=4),
    "int8 dense": partial(DenseCache, slot_bits=8),
}


# layer 0: head 1 needs everything; layer 1: none needs much
UNEVEN = HeadErrors(
    frames=(2, 4, 12),
    errors=(((0.01, 0.0, 0.0), (0.9, 0.9, 0.0)), ((0.02, 0.01, 0.0), (0.02, 0.01, 0.0))),
)


class Watcher:
    """A recorder that keeps events, with copies of what lies where later passes write."""

    def __init__(self) -> None:
        self.seen: list[AttendEvent] = []

    def on_attend(self, event: AttendEvent) -> None:
        self.seen.append(replace(event, k=event.k.clone(), v=event.v.clone()))


@pytest.mark.parametrize("name", PACKED)
def test_the_results_are_those_of_unpacked_slots(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While caches fill and merge; and the packed rollout never asks for a slot in the compute dtype."""
    backbone = small_backbone()
    unpacked = small_rollout(backbone, partial(PACKED[name], read_slots="unpacked"))
    expected = run(unpacked, history=8, generated=4)
    assert unpacked.state.working_bytes() > 0
    rollout = small_rollout(backbone, partial(PACKED[name], read_slots="packed"))
    with monkeypatch.context() as patch:
        patch.setattr(StoredView, "unpacked", lambda *_: pytest.fail("slots were unpacked"))
        found = run(rollout, history=8, generated=4)
    assert rollout.state.reading.slots == "packed: asked for" and rollout.state.working_bytes() == 0
    if name.endswith("tempcache"):
        assert rollout.state.cache.stored(0).log_count.max() > 0, "slots have merged"  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # keys of the sixth chunk came through two layers of attention: a last digit may decide a code
    assert rollout.state.cache.slots_used() == unpacked.state.cache.slots_used()


def test_recorders_see_what_is_attended_to() -> None:
    backbone, watchers = small_backbone(), (Watcher(), Watcher())
    for watcher, how in zip(watchers, ("packed", "unpacked"), strict=True):
        policy = partial(PACKED["int4 tempcache"], read_slots=how)
        run(small_rollout(backbone, policy, recorders=[watcher]), history=8, generated=2)
    packed, unpacked = (watcher.seen for watcher in watchers)
    assert len(packed) == len(unpacked) and packed[-1].log_count is not None
    for event, other in zip(packed, unpacked, strict=True):
        assert event.candidates == other.candidates == event.k.shape[2]
        for name in ("q", "k", "v", "out"):
            torch.testing.assert_close(getattr(event, name), getattr(other, name), rtol=1e-3, atol=1e-3)
        if event.log_count is not None:
            assert torch.equal(event.log_count, other.log_count)


def test_a_replayed_call_is_the_same() -> None:
    """Protocol A's look at the calls of another rollout."""
    backbone, teacher = small_backbone(), Watcher()
    run(small_rollout(backbone, recorders=[teacher]), history=6, generated=2)
    events = []
    for how in ("packed", "unpacked"):
        rollout = small_rollout(backbone, partial(PACKED["int4 tempcache"], read_slots=how))
        run(rollout, history=4, generated=2)
        events.append(rollout.state.replay(teacher.seen[-1 - LAYERS]))
    assert events[0].k.shape == events[1].k.shape
    torch.testing.assert_close(events[0].out, events[1].out, rtol=1e-3, atol=1e-4)


def bound(policy: CachePolicy, dtype: torch.dtype = torch.bfloat16, head_dim: int = DIM) -> CachePolicy:
    rope = small_backbone().transformer.rope
    policy.bind(
        CacheSpec(
            num_layers=LAYERS, batch=1, num_heads=HEADS, head_dim=head_dim, tokens_per_frame=GRID[0] * GRID[1],
            rope=rope, compute_dtype=dtype, device=torch.device("cpu"), chunk_frames=CHUNK,
        )
    )  # fmt: skip
    return policy


def test_who_decides_and_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that seems to have a GPU."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def said(
        policy: CachePolicy, *, device: torch.device = gpu, dtype: torch.dtype = torch.bfloat16,
        selector: Selector | None = None,
    ) -> str:  # fmt: skip
        reading = reading_of(policy, selector or Dense(), "sdpa", device, dtype)
        assert reading.heads is None and reading.record["slots_read"] == reading.slots
        assert reading.packed == str(reading.slots).startswith("packed")
        return str(reading.slots)

    window = bound(WindowCache(budget_frames=4, slot_bits=4))
    slots = window.capacity_slots()  # type: ignore[attr-defined]
    copies = LAYERS * HEADS * 2 * DIM * 2 * slots
    memory = 4 * copies
    assert said(window).startswith("unpacked: their copy takes 0.00 GiB")
    memory -= 1
    assert said(window).startswith("packed: their copy takes 0.00 GiB")
    assert said(bound(DenseCache(slot_bits=8))) == "packed: their copy would grow without bound"
    assert said(window, dtype=torch.float32) == (
        "unpacked: it computes in bfloat16 or float16, not in torch.float32"
    )
    assert said(window, device=cpu) == "unpacked: packed slots are read on a GPU"
    assert said(bound(StockWindow(attended_frames=4, slot_bits=4))).startswith(
        "unpacked: a stock window cuts"
    )
    assert said(bound(WindowCache(budget_frames=4, slot_bits=4, read_slots="unpacked"))) == (
        "unpacked: asked for"
    )
    wide = bound(WindowCache(budget_frames=4, slot_bits=4), head_dim=24)
    assert said(wide) == "unpacked: it takes heads of 16, 32, 64 or 128 numbers, not 24"
    assert said(bound(WindowCache(budget_frames=4))) == "None"
    sparse = AnnSA(bucketizer=LSHBucketizer(bits=3))
    assert said(window, selector=sparse).startswith("unpacked: AnnSA puts keys")


def test_what_cannot_be_read_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="read_slots=packed needs slots of 8 or 4 bits"):
        WindowCache(budget_frames=4, read_slots="packed")
    with pytest.raises(ValueError, match="unknown read_slots 'never'"):
        WindowCache(budget_frames=4, slot_bits=4, read_slots="never")  # type: ignore[arg-type]
    packed = {"slot_bits": 4, "read_slots": "packed"}
    refused: dict[str, Callable[[], CachePolicy]] = {
        "a stock window cuts": partial(StockWindow, attended_frames=4, **packed),
        "heads have slots of different kinds": partial(
            HeadwiseCache,
            policy=partial(WindowCache, **packed),
            local_policy=partial(WindowCache, slot_bits=8),
            local_error=0.5,
            head_errors=UNEVEN,
            budget_frames=12,
        ),
    }
    for reason, make in refused.items():
        with pytest.raises(ValueError, match=f"slots cannot be read packed: {reason}"):
            small_rollout(small_backbone(), make)
    with pytest.raises(ValueError, match="AnnSA puts keys in the order of its plans; set read_slots to"):
        small_rollout(
            small_backbone(), partial(WindowCache, budget_frames=4, **packed),
            lambda: AnnSA(bucketizer=LSHBucketizer(bits=3)),
        )  # fmt: skip


# -- heads of 128 in bfloat16, on a GPU --------------------------------------------------------------------------------


def gpu_state(
    cache: CachePolicy, engine: str, *, layers: int = 2, heads: int = 2, side: int = 8
) -> AttentionState:
    """Of heads of 128 and `side` x `side` tokens a frame."""
    return AttentionState(
        cache=cache, self_selector=Dense(), cross_selector=DenseCross(), engine=engine, rope=RotaryEmbedding(128),
        grid=(side, side), num_layers=layers, num_heads=heads, head_dim=128, batch=1, chunk_frames=CHUNK,
        compute_dtype=torch.bfloat16, device=torch.device("cuda"),
    )  # fmt: skip


def chunk_of(state: AttentionState, chunk: int) -> list[Tensor]:
    """What attention gives in a denoising pass and a commit of random vectors, the same whatever it gives."""
    spec, loop, outs = state.cache.spec, small_loop(), []
    generator = torch.Generator("cuda").manual_seed(chunk)
    tokens = CHUNK * spec.tokens_per_frame
    for context in (next(iter(loop.denoise_passes(chunk * CHUNK))), loop.commit_pass(chunk * CHUNK)):
        state.begin_pass(context)
        for layer in range(spec.num_layers):
            qkv = torch.randn(3, 1, spec.num_heads, tokens, 128, generator=generator, device="cuda")
            outs.append(state.attend("self", layer, *qkv.bfloat16()))
        state.end_pass()
    return outs


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("policy", [WindowCache, TempCache])
def test_attention_of_packed_slots_on_a_gpu(policy: Callable[..., CachePolicy], bits: int) -> None:
    """While the cache fills, is full and merges."""
    packed, unpacked = (
        gpu_state(policy(budget_frames=5, slot_bits=bits, read_slots=how), "sdpa")
        for how in ("packed", "unpacked")
    )
    assert packed.reading.packed and not unpacked.reading.packed
    for chunk in range(14):
        for out, expected in zip(chunk_of(packed, chunk), chunk_of(unpacked, chunk), strict=True):
            # both round to bfloat16 on the way
            assert relative_error(out, expected) < 2 * TOLERANCE[torch.bfloat16], chunk
    capacity = packed.cache.capacity_slots()  # type: ignore[attr-defined]
    assert packed.cache.slots_used() == capacity < 14 * CHUNK * 64


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("policy", [WindowCache, TempCache])
def test_graphs_give_the_same_bits_and_wait_for_nothing(
    policy: Callable[..., CachePolicy], bits: int
) -> None:
    backbone = text_backbone(dim=256)  # two heads of 128
    backbone.transformer.to("cuda", torch.bfloat16)
    make = partial(policy, budget_frames=6, slot_bits=bits, read_slots="packed")
    plain, captured = (rollout_of(backbone, make, capture=flag) for flag in (False, True))
    assert torch.equal(video(plain, 42), video(captured, 42))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.denoise()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def most_bytes(how: str) -> tuple[int, CachePolicy, Tensor]:
    """Bytes allocated at the peak of a chunk with a full cache of 4 layers of 12 heads, the cache, and attention."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    cache = WindowCache(budget_frames=16, slot_bits=4, read_slots=how)  # type: ignore[arg-type]
    state = gpu_state(cache, "sdpa", layers=4, heads=12, side=16)
    filling = cache.capacity_slots() // (CHUNK * 256) + 1
    for chunk in range(filling):
        chunk_of(state, chunk)
    torch.cuda.reset_peak_memory_stats()
    out = chunk_of(state, filling)[0]
    return torch.cuda.max_memory_allocated() - before, cache, out


@pytest.mark.gpu
def test_no_pass_holds_a_copy_of_the_cache() -> None:
    peak, cache, out = most_bytes("packed")
    assert cache.packing is not None and cache.packing.copy_bytes is not None
    copies, codes = cache.packing.copy_bytes, cache.bytes_used()
    assert codes < copies / 3
    assert codes < peak < codes + copies / 2, "a chunk of every layer, and the codes of one layer that move"
    del cache
    other, _, expected = most_bytes("unpacked")
    assert other > codes + copies
    assert relative_error(out, expected) < 2 * TOLERANCE[torch.bfloat16]
