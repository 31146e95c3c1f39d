"""The kernels of plan making, against the definitions in plain PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastar.engines.plan import WILDCARD
from fastar.sparsity import blocks, fused
from tests.hopper import compile_apart

BATCH, HEADS = 2, 3


@pytest.fixture(autouse=True)
def _kernels_run(device: torch.device) -> None:
    pytest.importorskip("triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")


def buckets_of(length: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 5, (BATCH, HEADS, length))


@pytest.mark.parametrize(("current", "cached"), [(21, 130), (32, 96), (9, 0)])
@pytest.mark.parametrize("low", [0, WILDCARD], ids=["buckets", "wildcards too"])
@pytest.mark.parametrize(("block_q", "block_k"), [(4, 8), (48, 16)])
def test_shared_pairs(
    current: int, cached: int, low: int, block_q: int, block_k: int, device: torch.device
) -> None:
    """On a GPU the function is the kernel."""
    queries, keys = buckets_of(current, low).sort(-1).values, buckets_of(cached + current, low)
    log_count = torch.zeros(keys.shape)
    log_count[..., :cached].masked_fill_(torch.rand(BATCH, HEADS, cached) < 0.3, -torch.inf)
    layout = blocks.lay_out_keys(keys, log_count, current)
    expected = blocks.shared_pairs(queries, layout, block_q, block_k, wildcards=low < 0)
    if device.type == "cuda":
        there = blocks.lay_out_keys(keys.to(device), log_count.to(device), current)
        for name in ("order", "buckets", "live"):
            assert torch.equal(getattr(there, name).cpu(), getattr(layout, name)), name
        found = blocks.shared_pairs(queries.to(device), there, block_q, block_k, wildcards=low < 0)
    else:
        places = [
            torch.searchsorted(layout.buckets.contiguous(), queries, out_int32=True, right=right)
            for right in (False, True)
        ]
        wild = torch.searchsorted(
            layout.buckets.contiguous(), torch.full_like(queries, WILDCARD), out_int32=True, right=True
        )
        reads_all = queries == WILDCARD
        places[0] = places[0].masked_fill(reads_all, 0)
        places[1] = torch.where(reads_all, (layout.live - current)[..., None].int(), places[1])
        wild = wild.masked_fill(reads_all, 0)
        found = fused.shared_pairs(*places, wild if low else None, keys.shape[2], current, block_q, block_k)
    assert torch.equal(found.cpu().long(), expected)


@pytest.mark.parametrize("of", ["all", "past"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("current", [20, 64])
def test_choose_blocks(current: int, density: float, of: blocks.DensityOf, device: torch.device) -> None:
    """Equal scores among them; the lists are those of the mask; heads have different numbers of live keys."""
    live = torch.tensor([[150, 149, current], [64, 81, 100]])
    scores = torch.randint(-3, 4, (BATCH, HEADS, 5, 19)).float()
    order = torch.arange(150).expand(BATCH, HEADS, -1)
    layout = blocks.KeyLayout(order, order[..., current:], live, current)
    expected = blocks.choose_blocks(scores, layout, 8, density, of)
    quotas = blocks.block_quotas(19, density, -(-current // 8), device, of)
    mask, (counts, indices) = fused.choose_blocks(scores.to(device), live.to(device), quotas, current, 8)
    assert torch.equal(mask.cpu(), expected.mask)
    assert torch.equal(counts.cpu(), expected.mask.sum(-1, dtype=torch.int32))
    for row, count, chosen in zip(
        indices.flatten(0, 2).cpu(), counts.flatten().cpu(), expected.mask.flatten(0, 2), strict=True
    ):
        assert torch.equal(row[:count].long(), chosen.nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 20, 128])
@pytest.mark.parametrize("size", [8, 48])
def test_block_means(size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of keys that lie in a wider buffer, empty slots last."""
    buffer = torch.randn(BATCH, HEADS, 140, width + 4).to(dtype)
    order = torch.rand(BATCH, HEADS, 130).argsort(-1)
    live = torch.tensor([[130, 129, 1], [70, 0, 96]])
    x = buffer[:, :, :130, :width]
    expected = blocks._block_means(x.float(), order, live, size)
    found = fused.block_means(
        x.to(device) if width > 1 else x.contiguous().to(device), order.to(device), live.to(device), size
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_long_rows_are_sorted_as_rows() -> None:
    buckets = torch.randint(WILDCARD, 2**16, (BATCH, HEADS, 5000))
    expected = buckets.sort(dim=-1, stable=True)
    values, order = blocks.sort_by_bucket(buckets.cuda())
    assert torch.equal(values.cpu(), expected.values) and torch.equal(order.cpu(), expected.indices)


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In a process without the interpreter, which replaces the compiler. Needs no GPU."""
    assert compile_apart("tests.sparsity.compile_kernels", tmp_path) == 5
