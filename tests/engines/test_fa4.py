"""What the fa4 engine hands to FlashAttention-4, by a stand-in that reads its arguments as the Hopper kernel does."""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastar import engines
from fastar.engines import fa4
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.fa4 import FA4

from .conftest import Draw


def attention(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One head: q [L, D] over the keys of each query's mask `read`; zeros and -inf where there are none."""
    logits = (q @ k.T * scale).masked_fill(~read, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v, logits.logsumexp(-1)


def head_by_head(q: Tensor, k: Tensor, v: Tensor, scale: float, read: Any) -> tuple[Tensor, Tensor]:
    """[B, L, H, D] tensors; read(b, h) is the mask of a head."""
    out, lse = (
        q.new_full((*q.shape[:3], v.shape[3]), torch.nan),
        q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan),
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            out[b, :, h], lse[b, h] = attention(q[b, :, h], k[b, :, h], v[b, :, h], read(b, h), scale)
    return out, lse


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_sparse_tensors: Any = None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    keys = k.shape[1]
    if block_sparse_tensors is None:
        everything = torch.ones(q.shape[1], keys, dtype=torch.bool)
        out, lse = head_by_head(q, k, v, softmax_scale, lambda b, h: everything)
        return out, lse if return_lse else None
    lists = block_sparse_tensors
    block_q, block_k = lists.block_size
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    for counts, indices in (
        (lists.mask_block_cnt, lists.mask_block_idx),
        (lists.full_block_cnt, lists.full_block_idx),
    ):
        assert counts.dtype == indices.dtype == torch.int32
        assert tuple(counts.shape) == shape and tuple(indices.shape[:3]) == shape and indices.stride(3) == 1
    assert not lists.mask_block_cnt.any(), "masked blocks would be read whole, too"

    # a tile that sticks out holds zeros, which only the first block to be read, the last of its list, leaves out
    k, v = (pad(x, (0, 0, 0, 0, 0, -keys % block_k)) for x in (k, v))

    def read(b: int, h: int) -> Tensor:
        mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        for m in range(shape[2]):
            row = lists.full_block_idx[b, h, m, : int(lists.full_block_cnt[b, h, m])].tolist()
            for place, block in enumerate(reversed(row)):
                stop = (block + 1) * block_k if place else min((block + 1) * block_k, keys)
                mask[m * block_q : (m + 1) * block_q, block * block_k : stop] = True
        return mask

    out, lse = head_by_head(q, k, v, softmax_scale, read)
    return out, lse if return_lse else None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seqused_k: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens_k is not None:  # one sequence of keys for each batch entry, one behind the other
        assert cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k.shape == (len(q) + 1,)
        ends = cu_seqlens_k.tolist()
        assert ends[0] == 0 and ends[-1] == len(k) and max(map(int.__sub__, ends[1:], ends)) == max_seqlen_k
        each = [
            head_by_head(
                q[b : b + 1], k[None, start:stop], v[None, start:stop], softmax_scale,
                lambda b, h, keys=stop - start: torch.ones(q.shape[1], keys, dtype=torch.bool),
            )
            for b, (start, stop) in enumerate(pairwise(ends))
        ]  # fmt: skip
        out, lse = (torch.cat(tensors) for tensors in zip(*each, strict=True))
        return out, lse if return_lse else None
    assert seqused_k is not None and max_seqlen_k is None
    assert seqused_k.dtype == torch.int32 and seqused_k.shape == q.shape[:1] and seqused_k.is_contiguous()
    places = torch.arange(k.shape[1])
    out, lse = head_by_head(
        q, k, v, softmax_scale, lambda b, h: (places < seqused_k[b]).expand(q.shape[1], -1)
    )
    return out, lse if return_lse else None


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None, None, None, None]:
    own, lse = flash_attn_func(q, k, v, **options)
    assert out.is_contiguous()
    return out.copy_(own), lse, None, None, None


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "_processors", lambda device: 132)
    package, cute, interface, sparsity = (
        ModuleType(name) for name in ("flash_attn", "cute", "interface", "block_sparsity")
    )
    interface._flash_attn_fwd = _flash_attn_fwd  # type: ignore[attr-defined]
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = SimpleNamespace  # type: ignore[attr-defined]
    modules = {"": package, ".cute": cute, ".cute.interface": interface, ".cute.block_sparsity": sparsity}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"flash_attn{name}", module)


@pytest.mark.parametrize("ordered", ["both", "queries", "neither"])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
def test_block_lists(draw: Draw, biased: bool, ordered: str) -> None:
    q, k, v = draw.normal(2, 3, 150, 16), draw.normal(2, 3, 133, 16), draw.normal(2, 3, 133, 24)
    plan = draw.plan(2, 3, 150, 133, 64, 16)
    if ordered != "both":
        orders = {"key_order": None} | ({"query_order": None} if ordered == "neither" else {})
        plan = dataclasses.replace(plan, **orders, lengths=(150, 133))
    log_count = draw.log_count(2, 3, 133) if biased else None
    call = engines.AttentionCall(q, k, v, log_count, plan, return_lse=True)
    assert FA4.limits(call) is None
    out, lse = FA4.run(call)
    expected, natural = engines.attend(
        q, k, v, log_count=log_count, plan=plan, engine="reference", return_lse=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert lse is not None
    torch.testing.assert_close(lse, natural, rtol=1e-4, atol=1e-4)
    assert (expected == 0).all(-1).any(), "a query block that reads nothing was among them"


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
def test_dense_calls(draw: Draw, biased: bool, ragged: bool) -> None:
    q, k, v = draw.normal(2, 3, 50, 16), draw.normal(2, 3, 133, 16), draw.normal(2, 3, 133, 24)
    lengths = torch.tensor([[133, 17, 0], [1, 132, 60]], dtype=torch.int32) if ragged else None
    log_count = draw.log_count(2, 3, 133) if biased else None
    out, lse = FA4.run(engines.AttentionCall(q, k, v, log_count, None, True, lengths=lengths))
    expected, natural = engines.attend(
        q, k, v, log_count=log_count, lengths=lengths, engine="reference", return_lse=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert lse is not None
    torch.testing.assert_close(lse, natural, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("split", [(128, 5), (0, 16), (256, 2)], ids=str)
def test_a_last_wave_is_split_over_the_keys(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, split: tuple[int, int], biased: bool, lse: bool
) -> None:
    """In slices of buffers, whose keys are no multiple of the parts; one head has empty slots alone."""
    wanted: list[tuple[int, ...]] = []
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: wanted.append((*sizes, listed)) or split)
    q, k, v = draw.normal(1, 3, 300, 16), draw.normal(1, 3, 200, 16), draw.normal(1, 3, 200, 24)
    k[:, :, 133:], v[:, :, 133:] = torch.nan, torch.nan
    k, v = k[:, :, :133], v[:, :, :133]
    log_count = draw.log_count(1, 3, 133) if biased else None
    out, natural = FA4.run(engines.AttentionCall(q, k, v, log_count, None, lse))
    expected, told = engines.attend(q, k, v, log_count=log_count, engine="reference", return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert wanted == [(300, 133, 3, 132, 192, 32 if biased else 16, False)] and (natural is not None) == lse
    if natural is not None:
        torch.testing.assert_close(natural, told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True], ids=["counts 1", "log_count"])
@pytest.mark.parametrize("split", [(128, 5), (0, 16), (256, 2)], ids=str)
def test_lists_of_a_last_wave_are_dealt_out(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, split: tuple[int, int], biased: bool
) -> None:
    """Lists of unequal lengths, one of them empty: parts without blocks, too, say nothing."""
    wanted: list[tuple[int, ...]] = []
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: wanted.append((*sizes, listed)) or split)
    q, k, v = draw.normal(1, 3, 300, 112), draw.normal(1, 3, 133, 112), draw.normal(1, 3, 133, 24)
    plan = draw.plan(1, 3, 300, 133, 128, 16)
    plan = dataclasses.replace(plan, max_blocks=int(plan.block_mask.sum(-1).max()))
    log_count = draw.log_count(1, 3, 133) if biased else None
    for _ in range(2):  # the second time by lists that are kept
        out, lse = FA4.run(engines.AttentionCall(q, k, v, log_count, plan, True))
        expected, natural = engines.attend(
            q, k, v, log_count=log_count, plan=plan, engine="reference", return_lse=True
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert lse is not None
        torch.testing.assert_close(lse, natural, rtol=1e-4, atol=1e-4)
    width = 128 if biased else 112
    assert wanted == [(300, plan.max_blocks * 16, 3, 132, 128, width, True)] * 2
    fewest = plan.dealt_out(split[0] // 128, split[1])[0].min()
    assert fewest == 0 if split[0] == 0 else fewest < plan.max_blocks
    with pytest.raises(ValueError, match="one batch entry are dealt out, not of 2"):
        draw.plan(2, 3, 300, 133, 128, 16).dealt_out(0, 2)


def test_plans_of_other_blocks_or_unknown_length_are_not_split(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: pytest.fail("it was asked for"))
    q, k, v = draw.normal(1, 3, 300, 112), draw.normal(1, 3, 133, 112), draw.normal(1, 3, 133, 24)
    for block_q, most in ((64, 9), (128, None)):
        plan = dataclasses.replace(draw.plan(1, 3, 300, 133, block_q, 16), max_blocks=most)
        out, _ = FA4.run(engines.AttentionCall(q, k, v, None, plan, False))
        expected = engines.attend(q, k, v, plan=plan, engine="reference")[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_and_calls_with_gradients_are_not_split(
    draw: Draw, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa4, "split_of", lambda *sizes, listed: pytest.fail("it was asked for"))
    q, k, v = (draw.normal(batch, 3, length, 16) for length in (300, 133, 133))
    q.requires_grad_(batch == 1)
    out, _ = FA4.run(engines.AttentionCall(q, k, v, None, None, False))
    torch.testing.assert_close(out, engines.attend(q, k, v, engine="reference")[0], rtol=1e-4, atol=1e-5)
    assert out.requires_grad == (batch == 1)


def test_keys_kept_augmented_are_handed_over_as_they_lie(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a buffer of slots is not copied, and the scale is that of the true head dim."""
    width = engines.key_width("fa4", 16)
    q, buffer, v = draw.normal(1, 3, 70, 16), draw.normal(1, 3, 200, width), draw.normal(1, 3, 200, 24)
    log_count = draw.log_count(1, 3, 133)
    log_count[0, 0] = 0.0
    buffer[:, :, :133] = augment_keys(buffer[:, :, :133, :16], log_count, width)
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        seen.extend((k, v))
        return flash_attn_func(q, k, v, **options)

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", spy)
    k = buffer[:, :, :133]
    plan = dataclasses.replace(draw.plan(1, 3, 70, 133, 64, 16), key_order=None, lengths=(70, 133))
    for options in ({"plan": None}, {"plan": plan}):
        call = engines.AttentionCall(
            augment_queries(q, width), k, v[:, :, :133], None, options["plan"], False, 16
        )
        out, _ = FA4.run(call)
        expected, _ = engines.attend(
            q, k[..., :16], v[:, :, :133], log_count=log_count, engine="reference", **options
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [x.data_ptr() for x in seen] == [buffer.data_ptr(), v.data_ptr()] * 2


def test_query_blocks_that_read_empty_slots_alone_get_zeros(draw: Draw) -> None:
    """The kernel would give them the mean of the empty slots."""
    q, k, v = draw.normal(2, 3, 150, 16), draw.normal(2, 3, 133, 16), draw.normal(2, 3, 133, 24)
    plan = draw.plan(2, 3, 150, 133, 64, 16)
    plan.block_mask[0, 0, 1] = torch.tensor([True] * 4 + [False] * 5)
    log_count = torch.zeros(2, 3, 133).scatter_(2, plan.key_index[..., :64], -torch.inf)
    out, _ = FA4.run(engines.AttentionCall(q, k, v, log_count, plan, False))
    expected, _ = engines.attend(q, k, v, log_count=log_count, plan=plan, engine="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0, 0].gather(0, plan.query_index[0, 0, 64:128, None].expand(-1, 24)) == 0).all()


def test_limits(draw: Draw) -> None:
    def reason(
        block_q: int, block_k: int, *, dims: tuple[int, int] = (16, 16), tags: bool = False
    ) -> str | None:
        q, k = draw.normal(1, 1, 70, dims[0]), draw.normal(1, 1, 133, dims[0])
        plan = draw.plan(1, 1, 70, 133, block_q, block_k, tags=tags)
        return FA4.limits(
            engines.AttentionCall(q, k, draw.normal(1, 1, 133, dims[1]), k[..., 0], plan, False)
        )

    assert reason(64, 128) is None and reason(192, 64) is None
    assert reason(32, 128) == "its plans need a multiple of 64 queries to a block, not 32"
    assert reason(64, 256) == "its plans need a multiple of 16 and at most 128 keys to a block, not 256"
    assert reason(64, 128, tags=True) == "it takes no block plan with tags inside the blocks"
    assert "not 272 and 128" in str(reason(64, 128, dims=(256, 128)))
    assert "not 32 and 20" in str(reason(64, 128, dims=(16, 20)))
