"""Keys that lie in the order of a chunk's plan: the same attention, and the past is put in order once a chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.ann import LSHBucketizer
from fastar.attention import state, working
from fastar.attention.context import PassContext
from fastar.cache import CachePolicy, DenseCache, TempCache, WindowCache
from fastar.engines import BlockPlan
from fastar.sparsity import AnnSA, Dense, Selector, SelectRequest
from tests.rollout.test_capture import rollout_of, video
from tests.small import CHUNK, GRID, LAYERS, run, small_backbone, small_loop, small_rollout, text_backbone

STEPS = 4
POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "dense": lambda: DenseCache(storage="float32"),
    "window": lambda: WindowCache(budget_frames=10, storage="float32"),
    "tempcache": lambda: TempCache(budget_frames=10, storage="float32"),
}


def annsa(density: float | None = 0.5, **options: Any) -> AnnSA:
    every = {"warmup_share": 0.0, "min_dense_steps": 0, "block_q": 4, "block_k": 4}
    return AnnSA(bucketizer=LSHBucketizer(bits=3), density=density, **(every | options))


class InPlace(Selector):
    """AnnSA whose plans seem to be new in every pass, so that its keys are put in order whenever they are read."""

    def __init__(self, inner: AnnSA) -> None:
        super().__init__()
        self.inner, self.blocks, self.tags_in_blocks = inner, inner.blocks, inner.tags_in_blocks

    def is_dense(self, layer: int, context: PassContext) -> bool:
        return self.inner.is_dense(layer, context)

    def select(self, request: SelectRequest) -> BlockPlan | None:
        return self.inner.select(request)

    def forget(self, next_frame: int) -> None:
        self.inner.forget(next_frame)


@pytest.mark.parametrize("commit_dense", [True, False], ids=["dense commits", "sparse commits"])
@pytest.mark.parametrize("engine", ["sdpa", "augmented"])
@pytest.mark.parametrize(("policy", "density"), [
    ("dense", 0.5), ("window", 0.5), ("tempcache", 0.5), ("tempcache", None),
])  # fmt: skip
def test_order_changes_no_bit(policy: str, density: float | None, engine: str, commit_dense: bool) -> None:
    """With log-counts beside the keys and in them, with tags in the blocks, while caches fill and are full."""
    videos = [
        run(small_rollout(small_backbone(), POLICIES[policy], selector, engine=engine), generated=10)
        for selector in (
            lambda: annsa(density, commit_dense=commit_dense),
            lambda: InPlace(annsa(density, commit_dense=commit_dense)),
        )
    ]
    assert torch.equal(*videos)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # FlashAttention-4 compiles for a few seconds for each kind of call
def test_order_changes_no_bit_of_flash_attention() -> None:
    """Heads of 128 in bfloat16, log-counts in the keys, queries put in order by the kernel that turns them."""
    reason = engines.get("fa4").unfit_for_device(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    backbone = text_backbone(dim=256)
    backbone.transformer.to("cuda", torch.bfloat16)
    blocks = {"block_q": 64, "block_k": 64}
    videos = [
        video(
            rollout_of(backbone, partial(TempCache, budget_frames=14), selector, capture=False, engine="fa4"),
            10 * 3,
        )
        for selector in (lambda: annsa(**blocks), lambda: InPlace(annsa(**blocks)))
    ]
    assert torch.equal(*videos)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_blocks_are_dense_attention(policy: str) -> None:
    almost = run(small_rollout(small_backbone(), POLICIES[policy], lambda: annsa(0.999)), generated=8)
    dense = run(small_rollout(small_backbone(), POLICIES[policy], Dense), generated=8)
    torch.testing.assert_close(almost, dense, rtol=1e-4, atol=1e-5)


class Watcher:
    """A recorder that compares what it is told with what it was told of the same queries."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_attend(self, event: Any) -> None:
        self.seen.append(event)


def test_recorders_see_keys_where_they_always_are() -> None:
    """The plan of the event, its order included, belongs to the keys of the event."""
    kept, anew = Watcher(), Watcher()
    backbone = small_backbone()
    for watcher, selector in ((kept, annsa), (anew, lambda: InPlace(annsa()))):
        run(small_rollout(backbone, POLICIES["window"], selector, recorders=[watcher]), generated=4)
    sparse = [pair for pair in zip(kept.seen, anew.seen, strict=True) if pair[0].plan is not None]
    assert len(sparse) == 2 * LAYERS * STEPS
    for event, other in sparse:
        assert torch.equal(event.plan.key_order, other.plan.key_order)
        for name in ("q", "k", "v", "out"):
            assert torch.equal(getattr(event, name), getattr(other, name)), name


def test_the_past_is_put_in_order_once_a_chunk_and_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[int] = []
    gather = working.gather_into

    def counting(target: Tensor, x: Tensor, order: Tensor) -> None:
        targets.append(target.data_ptr())
        gather(target, x, order)

    monkeypatch.setattr(working, "gather_into", counting)
    rollout = small_rollout(small_backbone(), POLICIES["window"], annsa, loop=small_loop())
    run(rollout, history=8, generated=8)
    chunks, each = 8 // CHUNK, 2 * LAYERS
    assert len(targets) == chunks * each
    full = targets[-each:]  # of a cache that is full: keys and values of each layer at their addresses
    assert targets[-2 * each : -each] == full
    memory: state.WorkingMemory = rollout.state._memory
    slots = (10 + CHUNK) * GRID[0] * GRID[1]
    keys, values = memory._ordered_copies[0]
    assert keys.shape[2] == values.shape[2] <= slots
    assert rollout.state.working_bytes() == LAYERS * (keys.nbytes + values.nbytes)
