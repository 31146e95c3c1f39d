"""Heads with unequally many slots: the same results from engines that read no more than each head has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fastar import engines
from fastar.ann import LSHBucketizer
from fastar.attention.working import WorkingKeys
from fastar.cache import CacheView, HeadwiseCache, TempCache, WindowCache
from fastar.cache.base import StoredView
from fastar.rollout.rollout import Rollout
from fastar.sparsity import AnnSA
from tests.engines.test_engines import TOLERANCE, relative_error
from tests.rollout.loops import LOOPS, STAGGERED, started
from tests.small import run, small_backbone, small_rollout

from .test_packed import UNEVEN, Watcher, chunk_of, gpu_state

FLOAT = {"storage": "float32"}
POLICIES: dict[str, Callable[[], HeadwiseCache]] = {
    "window": partial(
        HeadwiseCache, policy=partial(WindowCache, **FLOAT), head_errors=UNEVEN, budget_frames=12
    ),
    "tempcache": partial(
        HeadwiseCache, policy=partial(TempCache, moment="diagonal", recent_share=0.2, **FLOAT),
        local_policy=partial(WindowCache, slot_bits=8), local_error=0.5, head_errors=UNEVEN, budget_frames=13,
    ),
}  # fmt: skip


def poisoned(view: Callable[..., CacheView], poison: float) -> Callable[..., CacheView]:
    """`HeadwiseCache.view` with `poison` for keys and values behind a head's slots, which seem to be live."""

    def changed(self: HeadwiseCache, layer: int) -> CacheView:
        seen = view(self, layer)
        if seen.lengths is None:
            return seen
        assert seen.log_count is not None
        behind = torch.arange(seen.k.shape[2], device=seen.k.device) >= seen.lengths[..., None]
        assert torch.equal(behind, seen.log_count == -torch.inf)
        k, v = (x.masked_fill(behind[..., None], poison) for x in (seen.k, seen.v))
        return replace(seen, k=k, v=v, log_count=seen.log_count.masked_fill(behind, 0.0))

    return changed


def headwise(rollout: Rollout) -> Any:
    return rollout.state.cache


@pytest.mark.parametrize("name", POLICIES)
def test_padding_is_never_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition, which takes lengths; the padded view by an engine that does not."""
    backbone = small_backbone()
    padded = small_rollout(backbone, POLICIES[name], engine="sdpa")
    expected = run(padded, history=10, generated=8)
    ragged = small_rollout(backbone, POLICIES[name], engine="reference")
    with monkeypatch.context() as patch:
        patch.setattr(HeadwiseCache, "view", poisoned(HeadwiseCache.view, torch.nan))
        found = run(ragged, history=10, generated=8)
    lengths = headwise(ragged).view(0).lengths
    assert lengths is not None and 2 * lengths.min() < lengths.max()
    assert ragged.state.reading.heads == "each its own slots"
    assert padded.state.reading.heads == "padded: the engine sdpa takes no lengths"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loop", STAGGERED)
def test_chunks_in_flight_see_no_later_ones(loop: str) -> None:
    """A pass over several chunks, each of which reads the current keys up to its own."""
    backbone = small_backbone()
    rollouts = [
        started(backbone, LOOPS[loop], partial(POLICIES["window"], budget_frames=14), engine=engine)
        for engine in ("reference", "sdpa")
    ]
    actions = torch.zeros(1, 24, dtype=torch.long)
    videos = [torch.cat(list(rollout.generate(12, actions)), 1) for rollout in rollouts]
    assert headwise(rollouts[0]).view(0).lengths is not None and rollouts[0].state.reading.ragged
    torch.testing.assert_close(*videos, rtol=1e-4, atol=1e-4)


def test_the_first_current_keys_and_all_slots_of_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 9, 16, generator=generator)
    lengths = torch.tensor([[9, 6]], dtype=torch.int32)  # four current tokens, and five or two slots
    counts = torch.randn(1, 2, 9, generator=generator)
    counts[0, 1, 6:] = -torch.inf
    working = WorkingKeys(k, v, counts, 5, None, None, lengths)
    current_k, current_v = working.current
    assert torch.equal(current_k, k[:, :, :4]) and torch.equal(current_v, v[:, :, :4])
    part, q = working.until(3), torch.randn(1, 2, 7, 16, generator=generator)
    assert part.lengths is not None and part.lengths.tolist() == [[8, 5]] and part.cached == 5
    out = part.attend(q, None, "reference")
    seen = part.seen()
    assert torch.equal(seen[0][:, :, 5:], k[:, :, :3]), "the current ones are last for those who look on"
    expected, _ = engines.attend(q, seen[0], seen[1], log_count=seen[2], engine="reference")
    torch.testing.assert_close(out, expected)
    assert working.until(4) is working


def test_recorders_see_what_they_always_see() -> None:
    backbone, watchers = small_backbone(), (Watcher(), Watcher())
    for watcher, engine in zip(watchers, ("reference", "sdpa"), strict=True):
        run(
            small_rollout(backbone, POLICIES["tempcache"], engine=engine, recorders=[watcher]),
            history=14,
            generated=2,
        )
    for event, other in zip(*(watcher.seen for watcher in watchers), strict=True):
        assert event.candidates == other.candidates
        for name in ("k", "v", "out"):
            torch.testing.assert_close(getattr(event, name), getattr(other, name), rtol=1e-3, atol=1e-4)
        if event.log_count is not None:
            assert torch.equal(event.log_count, other.log_count)


def test_plans_are_of_padded_heads() -> None:
    rollout = small_rollout(
        small_backbone(),
        POLICIES["window"],
        lambda: AnnSA(bucketizer=LSHBucketizer(bits=3)),
        engine="reference",
    )
    assert rollout.state.reading.heads == "padded: AnnSA puts keys in the order of its plans"
    even = small_rollout(small_backbone(), partial(POLICIES["window"], head_errors=None), engine="reference")
    assert even.state.reading.heads is None and not even.state.reading.ragged


PACKED: dict[str, Callable[..., HeadwiseCache]] = {
    "window": partial(
        HeadwiseCache, policy=partial(WindowCache, slot_bits=4), head_errors=UNEVEN, budget_frames=5
    ),
    "tempcache": partial(
        HeadwiseCache, policy=partial(TempCache, slot_bits=4, moment="diagonal", recent_share=0.2),
        local_policy=partial(WindowCache, slot_bits=4), local_error=0.5, head_errors=UNEVEN, budget_frames=6,
    ),
}  # fmt: skip


def read_by(make: Callable[..., HeadwiseCache], how: str) -> Callable[[], HeadwiseCache]:
    """The same whose groups' slots are read so."""
    policies = {
        name: partial(make.keywords[name], read_slots=how)  # type: ignore[attr-defined]
        for name in ("policy", "local_policy")
        if name in make.keywords  # type: ignore[attr-defined]
    }
    return partial(make, **policies)


def spoil(cache: HeadwiseCache) -> None:
    """Rubbish in all rows of an empty cache, of which slots take the place of some."""
    for layer in cache._rows:
        for field in layer.slots.fields.values():
            field.fill_(255 if field.dtype == torch.uint8 else torch.nan)


@pytest.mark.parametrize("name", PACKED)
def test_packed_slots_of_unequal_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call a layer, and without a copy; what lies between heads is never read."""
    backbone = small_backbone()
    padded = small_rollout(backbone, read_by(PACKED[name], "unpacked"), engine="sdpa")
    expected = run(padded, history=18, generated=4)
    packed = small_rollout(backbone, read_by(PACKED[name], "packed"), engine="sdpa")
    spoil(headwise(packed))
    with monkeypatch.context() as patch:
        patch.setattr(StoredView, "unpacked", lambda *_: pytest.fail("slots were unpacked"))
        found = run(packed, history=18, generated=4)
    assert packed.state.reading.record == {
        "slots_read": "packed: asked for",
        "heads_read": "each its own slots",
    }
    cache, stored = headwise(packed), headwise(packed).stored(0)
    views = [cache.view(layer) for layer in range(2)]
    assert cache.packing.copy_bytes == sum(view.k.nbytes + view.v.nbytes for view in views), "padded, full"
    assert 2 * stored.lengths.min() < stored.lengths.max() == stored.longest
    assert (stored.log_count is not None) == (name == "tempcache") and packed.state.working_bytes() == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    k, v = stored.padded().unpacked(torch.float32)
    view = headwise(packed).view(0)
    live = view.log_count > -torch.inf
    assert torch.equal(k[live], view.k[live]) and torch.equal(v[live], view.v[live])
    assert torch.equal(stored.padded().log_count, view.log_count)


def test_rows_of_a_saved_cache(device: torch.device) -> None:
    """What is restored lies where attention reads it."""
    backbone = small_backbone()
    # a GPU reads packed slots in half precision alone
    backbone.transformer.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    make = read_by(PACKED["tempcache"], "packed")
    first, second = (small_rollout(backbone, make, engine="sdpa") for _ in range(2))
    run(first, history=8, generated=2)
    headwise(second).load_state_dict(headwise(first).state_dict())
    for layer in range(2):
        one, other = (headwise(rollout).stored(layer) for rollout in (first, second))
        for a, b in zip(
            one.padded().unpacked(torch.float32), other.padded().unpacked(torch.float32), strict=True
        ):
            assert torch.equal(a, b)
        assert torch.equal(one.lengths, other.lengths) and one.longest == other.longest


@pytest.mark.gpu
@pytest.mark.timeout(300)  # FlashAttention-4 compiles for a few seconds for each kind of call
@pytest.mark.parametrize("name", POLICIES)
def test_flash_attention_reads_each_heads_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 128 in bfloat16; kernels may multiply what is behind a length by a weight of zero: no NaN there."""
    reason = engines.get("fa4").unfit_for_device(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    policies: dict[str, Any] = {"policy": WindowCache}
    if name == "tempcache":
        policies = {
            "policy": partial(TempCache, recent_share=0.2),
            "local_policy": partial(WindowCache, slot_bits=8),
            "local_error": 0.5,
        }
    ragged, padded = (
        gpu_state(HeadwiseCache(head_errors=UNEVEN, budget_frames=14, **policies), engine)
        for engine in ("fa4", "sdpa")
    )
    assert ragged.reading.ragged and not padded.reading.ragged
    for chunk in range(16):
        with monkeypatch.context() as patch:
            patch.setattr(HeadwiseCache, "view", poisoned(HeadwiseCache.view, 1e4))
            outs = chunk_of(ragged, chunk)
        for out, expected in zip(outs, chunk_of(padded, chunk), strict=True):
            assert relative_error(out, expected) < 2 * TOLERANCE[torch.bfloat16], chunk
    lengths = ragged.cache.view(0).lengths
    assert lengths is not None and 2 * lengths.min() < lengths.max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_packed_slots_of_unequal_heads_on_a_gpu(name: str) -> None:
    make = partial(PACKED[name], budget_frames=5)
    packed, padded = (gpu_state(read_by(make, how)(), "sdpa") for how in ("packed", "unpacked"))
    spoil(packed.cache)  # type: ignore[arg-type]
    for chunk in range(16):
        for out, expected in zip(chunk_of(packed, chunk), chunk_of(padded, chunk), strict=True):
            assert relative_error(out, expected) < 2 * TOLERANCE[torch.bfloat16], chunk
    stored = packed.cache.stored(0)
    assert stored.lengths is not None and 2 * stored.lengths.min() < stored.lengths.max()
