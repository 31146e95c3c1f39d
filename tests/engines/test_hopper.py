"""The engines of foreign kernels on the GPU they are written for, against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastar import engines
from fastar.engines import BlockPlan, fa4
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.waves import split_of

from .conftest import Draw
from .test_engines import TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # FlashInfer compiles for 90 s on first use

HEADS = (2, 3)
# queries, keys, head dim, value dim; lengths that are no multiple of the tiles included
DENSE = {
    "wan": (600, 1500, 128, 128),
    "narrow": (600, 1500, 64, 64),
    "one tile": (50, 77, 128, 128),
    "tiny": (50, 77, 16, 16),
    "wide values": (50, 77, 24, 40),
}
# the same, then queries and keys to a block
SPARSE = {
    "tiles": (600, 1500, 128, 128, 128, 128),
    "whole tiles": (512, 1024, 128, 128, 128, 128),
    "half tiles": (600, 1500, 128, 128, 64, 64),
    "tall": (600, 1500, 128, 128, 256, 128),
    "short keys": (600, 1500, 128, 128, 64, 32),
    "narrow": (600, 1500, 64, 64, 128, 128),
}


def usable(name: str, call: engines.AttentionCall | None = None) -> None:
    """Skip, with the engine's reason, where it cannot run here or not this call."""
    engine = engines.get(name)
    reason = engine.unfit_for_device(torch.device("cuda")) or (call and engine.unfit_for(call))
    if reason:
        pytest.skip(f"{name}: {reason}")


def poison(*shape: int) -> None:
    """Leave NaN in the memory that the next output of this shape is likely to get."""
    torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)


def check(name: str, q: Tensor, k: Tensor, v: Tensor, *, lse: bool = False, **options: object) -> Tensor:
    """The engine's output, after comparing it (and lse) with the reference."""
    expected, natural = engines.attend(
        q.float(), k.float(), v.float(), engine="reference", return_lse=True, **options
    )
    given = {"log_count": None, "plan": None} | {
        n: x for n, x in options.items() if n in ("log_count", "plan")
    }
    usable(name, engines.AttentionCall(q, k, v, **given, return_lse=lse))
    poison(*expected.shape)
    out, found = engines.attend(q, k, v, engine=name, return_lse=lse, **options)
    assert out.dtype == q.dtype and out.shape == expected.shape and torch.isfinite(out).all()
    assert relative_error(out, expected) < TOLERANCE[q.dtype]
    nothing = (expected == 0).all(-1)
    assert (out[nothing] == 0).all(), "a query with no key to attend to gets zeros"
    if lse:
        torch.testing.assert_close(found, natural, rtol=1e-3, atol=2e-3)
    return nothing


@pytest.fixture
def draw(draw: Draw) -> Draw:
    return dataclasses.replace(draw, device=torch.device("cuda"), dtype=torch.bfloat16)


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("engine", ["fa4", "flashinfer", "cudnn"])
def test_dense_and_log_counted(draw: Draw, engine: str, case: str, biased: bool) -> None:
    if (engine, case) == ("flashinfer", "narrow"):
        pytest.skip("it compiles for 90 s for each pair of widths: those of heads of 128 are enough")
    queries, keys, head_dim, value_dim = DENSE[case]
    q, k, v = (
        draw.normal(*HEADS, queries, head_dim),
        draw.normal(*HEADS, keys, head_dim),
        draw.normal(*HEADS, keys, value_dim),
    )
    log_count = draw.log_count(*HEADS, keys) if biased else None
    nothing = check(engine, q, k, v, lse=engine != "cudnn", log_count=log_count)
    assert nothing.any() == biased


def as_in_a_graph(attend: Callable[[], Tensor]) -> Tensor:
    """What a replayed graph of the call writes: the same bits as the call."""
    expected, graph = attend(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
    return out.clone()


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("queries", [100, 1560])
def test_a_last_wave_is_split_over_the_keys(
    draw: Draw, queries: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU whose processors so few tiles do not fill; alone and in a graph."""
    usable("fa4")
    split = split_of(queries, 5001, 12, fa4._processors(torch.device("cuda")), 128, 128)
    assert split is not None and (split[0] > 0) == (queries == 1560)
    q, k, v = (draw.normal(1, 12, length, 128) for length in (queries, 5001, 5001))
    log_count = draw.log_count(1, 12, 5001) if biased else None
    check("fa4", q, k, v, lse=True, log_count=log_count)
    given = {"engine": "fa4", "log_count": log_count}
    out = as_in_a_graph(lambda: engines.attend(q, k, v, **given)[0])
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: None)
    whole = engines.attend(q, k, v, **given)[0]
    assert relative_error(out, whole.float()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
def test_lists_of_a_last_wave_are_dealt_out(
    draw: Draw, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As alone, so in a graph."""
    usable("fa4")
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: (1408, 7))
    q, k, v = (draw.normal(1, 12, length, 128) for length in (1560, 9001, 9001))
    plan = draw.plan(1, 12, 1560, 9001, 128, 128)
    plan = dataclasses.replace(plan, max_blocks=int(plan.block_mask.sum(-1).max()))
    log_count = draw.log_count(1, 12, 9001) if biased else None
    assert check("fa4", q, k, v, lse=True, log_count=log_count, plan=plan).any()
    given = {"engine": "fa4", "log_count": log_count, "plan": plan}
    as_in_a_graph(lambda: engines.attend(q, k, v, **given)[0])


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("case", SPARSE)
def test_block_sparse_and_log_counted(draw: Draw, case: str, biased: bool) -> None:
    queries, keys, head_dim, value_dim, block_q, block_k = SPARSE[case]
    q, k, v = (
        draw.normal(*HEADS, queries, head_dim),
        draw.normal(*HEADS, keys, head_dim),
        draw.normal(*HEADS, keys, value_dim),
    )
    plan = draw.plan(*HEADS, queries, keys, block_q, block_k)
    log_count = draw.log_count(*HEADS, keys) if biased else None
    assert check("fa4", q, k, v, lse=True, log_count=log_count, plan=plan).any()


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
def test_heads_with_lengths_of_their_own(draw: Draw, biased: bool) -> None:
    q, k, v = draw.normal(*HEADS, 300, 128), draw.normal(*HEADS, 900, 128), draw.normal(*HEADS, 900, 128)
    lengths = torch.tensor([[900, 0, 128], [1, 500, 899]], dtype=torch.int32, device="cuda")
    log_count = draw.log_count(*HEADS, 900) if biased else None
    check("fa4", q, k, v, lse=True, lengths=lengths, log_count=log_count)


def slots(draw: Draw, engine: str, *, size: int, used: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a rollout keeps: q, a buffer of augmented keys and one of values, then plain keys and log-counts."""
    width = engines.key_width(engine, 128)
    q, k = draw.normal(*HEADS, 300, 128), draw.normal(*HEADS, used, 128)
    log_count = draw.log_count(*HEADS, used)
    log_count[0, 0] = 0.0
    keys = torch.full((*HEADS, size, width), torch.nan, dtype=draw.dtype, device=draw.device)
    values = torch.full((*HEADS, size, 128), torch.nan, dtype=draw.dtype, device=draw.device)
    keys[:, :, :used], values[:, :, :used] = augment_keys(k, log_count, width), draw.normal(*HEADS, used, 128)
    return augment_queries(q, width), keys, values, k, log_count


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("engine", ["fa4", "flashinfer", "cudnn"])
def test_keys_are_read_where_they_lie(draw: Draw, engine: str, planned: bool) -> None:
    """Slices of larger buffers that hold NaN behind them: no copy is made, and nothing behind the slice is read."""
    q, keys, values, k, log_count = slots(draw, engine, size=8000, used=7700)
    plan = None
    if planned:
        plan = dataclasses.replace(
            draw.plan(*HEADS, 300, 7700, 128, 128), key_order=None, lengths=(300, 7700)
        )
    given = (q, keys[:, :, :7700], values[:, :, :7700])
    usable(engine, engines.AttentionCall(*given, None, plan, return_lse=False, head_dim=128))
    expected, _ = engines.attend(
        q[..., :128].float(), k.float(), given[2].float(), log_count=log_count, plan=plan, engine="reference"
    )
    options = {"head_dim": 128, "plan": plan, "engine": engine}
    engines.attend(*given, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = engines.attend(*given, **options)
    taken = torch.cuda.max_memory_allocated() - before
    assert relative_error(out, expected) < TOLERANCE[draw.dtype]
    workspace = 32 * 2**20 if engine == "flashinfer" else 0  # its scratch
    assert taken - workspace < k.nbytes


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("engine", ["fa4", "flashinfer", "cudnn"])
def test_calls_do_not_wait_for_the_gpu_and_can_be_captured(draw: Draw, engine: str, planned: bool) -> None:
    """A replayed graph sees what the buffers hold by then, the block mask too if its lists are made in the graph."""
    q, keys, values, k, log_count = slots(draw, engine, size=1500, used=1500)
    plan, masks = None, [torch.empty(0)] * 2
    if planned:
        drawn = [draw.plan(*HEADS, 300, 1500, 128, 128) for _ in range(2)]
        plan, masks = drawn[0], [plan.block_mask.clone() for plan in drawn]
    usable(engine, engines.AttentionCall(q, keys, values, None, plan, return_lse=False, head_dim=128))

    def attend() -> Tensor:
        made = None if plan is None else dataclasses.replace(plan)  # one that has no lists yet
        return engines.attend(q, keys, values, head_dim=128, plan=made, engine=engine)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for mask in masks:
        q[..., :128] = draw.normal(*HEADS, 300, 128)
        values.copy_(draw.normal(*HEADS, 1500, 128))
        if plan is not None:
            plan.block_mask.copy_(mask)
        out.fill_(torch.nan)
        graph.replay()
        expected, _ = engines.attend(
            q[..., :128].float(),
            k.float(),
            values.float(),
            log_count=log_count,
            plan=plan,
            engine="reference",
        )
        assert relative_error(out, expected) < TOLERANCE[draw.dtype]


def test_an_order_of_none_is_the_identity(draw: Draw) -> None:
    usable("fa4")
    q, k, v = draw.normal(*HEADS, 300, 128), draw.normal(*HEADS, 900, 128), draw.normal(*HEADS, 900, 128)
    mask = draw.plan(*HEADS, 300, 900, 128, 128).block_mask
    plan = BlockPlan(None, None, 128, 128, mask, lengths=(300, 900))
    check("fa4", q, k, v, plan=plan, lse=True)


def test_counts_of_one_change_little(draw: Draw) -> None:
    """Not bit by bit, as on the other engines: the wider head has tiles of its own."""
    usable("fa4")
    q, k, v = draw.normal(*HEADS, 300, 128), draw.normal(*HEADS, 900, 128), draw.normal(*HEADS, 900, 128)
    plain, _ = engines.attend(q, k, v, engine="fa4")
    counted, _ = engines.attend(q, k, v, log_count=torch.zeros(900, device="cuda"), engine="fa4")
    assert relative_error(counted, plain) < TOLERANCE[draw.dtype]


@pytest.mark.parametrize("engine", ["fa4", "flashinfer", "cudnn"])
def test_merged_duplicates_change_nothing(draw: Draw, engine: str) -> None:
    """The TempCache lemma, at counts that a bfloat16 cannot hold."""
    usable(engine)
    q, k, v = (
        draw.normal(1, 2, 200, 128),
        draw.normal(1, 2, 300, 128),
        draw.normal(1, 2, 300, 128),
    )
    sizes = torch.randint(1, 40, (300,), generator=draw.generator)
    sizes[7] = 3001
    whole = (x.float().repeat_interleave(sizes.cuda(), dim=2) for x in (k, v))
    expected, _ = engines.attend(q.float(), *whole, engine="reference")
    merged, _ = engines.attend(q, k, v, log_count=sizes.log().cuda(), engine=engine)
    assert relative_error(merged, expected) < TOLERANCE[draw.dtype]
