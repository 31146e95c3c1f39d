"""AnnCA keeps what a brute-force comparison of buckets keeps; lossless merging loses nothing."""

from __future__ import annotations

import pytest
import torch

from fastar import engines
from fastar.ann.base import Bucketizer
from fastar.attention.context import PassContext, PassKind
from fastar.sparsity import AnnCA, DenseCross, PromptKeys, compact, merge_identical

from .conftest import FirstCoordinate, denoise

SPARSE = denoise(3, 4)


def latents_and_prompt(seed: int = 0, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent queries in few of the buckets that prompt keys are in."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(2, heads, 30, 8, generator=generator),
        torch.randn(2, heads, 20, 8, generator=generator),
    )
    q[..., 0] = torch.randint(0, 40, (2, heads, 30), generator=generator).float()
    k[..., 0] = torch.randint(0, 40, (2, heads, 20), generator=generator).float()
    return q, k


def real(k: torch.Tensor) -> PromptKeys:
    """Prompt keys without padding."""
    return PromptKeys(k, torch.ones(k.shape[:3], dtype=torch.bool))


@pytest.mark.parametrize("shared_heads", [False, True])
def test_keeps_exactly_the_tokens_that_share_a_bucket(shared_heads: bool) -> None:
    q, k = latents_and_prompt()
    keep = AnnCA(bucketizer=FirstCoordinate(), shared_heads=shared_heads).select(0, SPARSE, q, real(k))
    assert keep is not None and 0 < int(keep.sum()) < keep.numel()
    for b in range(2):
        for h in range(3):
            source = 0 if shared_heads else h  # concatenated heads: the first head's first coordinate leads
            seen = {int(x) for x in q[b, source, :, 0]}
            assert keep[b, h].tolist() == [int(x) in seen for x in k[b, source, :, 0]]


def test_compaction_attends_to_the_kept_tokens_alone() -> None:
    q, k = latents_and_prompt()
    v = torch.randn(2, 3, 20, 8)
    keep = AnnCA(bucketizer=FirstCoordinate()).select(0, SPARSE, q, real(k))
    assert keep is not None
    log_count = torch.randint(1, 5, keep.shape).float().log()
    short_k, short_v, short_count = compact(k, v, keep, log_count)
    assert short_k.shape[2] == int(keep.sum(-1).max()) < 20
    expected, _ = engines.attend(
        q, k, v, log_count=log_count.masked_fill(~keep, -torch.inf), engine="reference"
    )
    out, _ = engines.attend(q, short_k, short_v, log_count=short_count, engine="sdpa")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    wide = compact(k, v, keep, log_count, width=18)
    out, _ = engines.attend(q, wide[0], wide[1], log_count=wide[2], engine="sdpa")
    assert wide[0].shape[2] == 18
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_keeps_nothing_puts_out_zero() -> None:
    q, k = latents_and_prompt()
    k[0, 1, :, 0] = 99.0
    keep = AnnCA(bucketizer=FirstCoordinate()).select(0, SPARSE, q, real(k))
    assert keep is not None and not keep[0, 1].any()
    short_k, short_v, log_count = compact(k, torch.randn(2, 3, 20, 8), keep)
    out, _ = engines.attend(q, short_k, short_v, log_count=log_count, engine="sdpa")
    assert (out[0, 1] == 0).all() and (out[0, 0] != 0).any()


def test_all_tokens_in_dense_passes() -> None:
    q, k = latents_and_prompt()
    annca = AnnCA(bucketizer=FirstCoordinate(), layers=[0])
    for layer, context in [
        (0, denoise(0, 4)),
        (1, SPARSE),
        (0, PassContext(PassKind.COMMIT, 0, 4, (0.0,) * 4)),
    ]:
        assert annca.select(layer, context, q, real(k)) is None
    assert DenseCross().select(0, SPARSE, q, real(k)) is None
    k_all, v_all, log_count = compact(k, k, None)
    assert k_all is k and v_all is k and log_count is None


def test_decisions_are_kept_for_a_chunk_if_asked() -> None:
    (q, k), (q2, _) = latents_and_prompt(0), latents_and_prompt(1)
    fresh, kept = AnnCA(bucketizer=FirstCoordinate()), AnnCA(bucketizer=FirstCoordinate(), rebuild="chunk")
    first = kept.select(0, denoise(2, 4), q, real(k))
    assert kept.select(0, SPARSE, q2, real(k)) is first
    assert first is not None and not torch.equal(fresh.select(0, SPARSE, q2, real(k)), first)
    assert kept.select(0, denoise(3, 4, first_frame=12), q2, real(k)) is not first


def test_tags_are_the_buckets() -> None:
    q, k = latents_and_prompt()
    bucketizer: Bucketizer = FirstCoordinate()
    queries, keys = AnnCA(bucketizer=bucketizer).tags(q, real(k))
    assert torch.equal(queries, q[..., 0].long()) and torch.equal(keys, k[..., 0].long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_identical_tokens_changes_nothing(dtype: torch.dtype) -> None:
    """A prompt of 11 words padded to 64 with one repeated row, another row repeated in one head only."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 64, 8, generator=generator).to(dtype) for _ in range(2))
    k[:, :, 11:], v[:, :, 11:] = k[:, :, 11:12], v[:, :, 11:12]
    k[0, 1, 7], v[0, 1, 7] = k[0, 1, 2], v[0, 1, 2]
    k[1, 0, 5] = k[1, 0, 4]  # equal keys, different values: not the same token
    q = torch.randn(2, 3, 10, 8, generator=generator).to(dtype)
    merged_k, merged_v, log_count = merge_identical(k, v)
    assert merged_k.shape[2] == 12
    sizes = log_count.exp().round().long()
    assert sizes[1, 2].tolist() == [1] * 11 + [53]
    assert sizes[0, 1].tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 53, 0]
    assert torch.equal(merged_k[0, 1, :10], k[0, 1, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]])
    expected, _ = engines.attend(q, k, v, engine="reference")
    out, _ = engines.attend(q, merged_k, merged_v, log_count=log_count, engine="reference")
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert float((out - expected).float().norm() / expected.float().norm()) < tolerance


def test_distinct_tokens_are_not_merged() -> None:
    k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    merged_k, merged_v, log_count = merge_identical(k, v)
    assert torch.equal(merged_k, k) and torch.equal(merged_v, v) and (log_count == 0).all()
