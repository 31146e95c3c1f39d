"""The augmented head adds log-counts to dot products of kernels that know no bias."""

from __future__ import annotations

import math

import pytest
import torch

from fastar.engines.augmented import EMPTY, augment_keys, augment_queries, augmented_width, write_log_counts


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-4), (torch.float16, 2e-5)]
)
def test_the_split_carries_log_counts_beyond_the_storage_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """With zero queries the logit is the log-count alone; a single bfloat16 would be off by up to 0.4 %."""
    counts = torch.arange(1, 5000, dtype=torch.float64)
    q, k = torch.zeros(1, 64, dtype=dtype), torch.zeros(len(counts), 64, dtype=dtype)
    width = augmented_width(64, 8)
    products = augment_queries(q, width).double() @ augment_keys(k, counts.log().float(), width).double().T
    error = (products[0] / math.sqrt(64) - counts.log()).abs().max()
    assert error < tolerance


def test_widths_are_rounded_up() -> None:
    assert [augmented_width(d, 8) for d in (62, 64, 126, 128)] == [64, 72, 128, 136]
    assert augmented_width(128, 16) == 144


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_slots_are_finite_and_get_no_weight(dtype: torch.dtype) -> None:
    k = augment_keys(torch.zeros(2, 128, dtype=dtype), torch.tensor([-torch.inf, 0.0]), 136)
    assert k.isfinite().all()
    logits = augment_queries(torch.zeros(1, 128, dtype=dtype), 136).float() @ k.float().T / math.sqrt(128)
    assert logits[0, 0] == pytest.approx(EMPTY / math.sqrt(128), rel=1e-3)
    assert torch.softmax(logits, dim=-1).tolist() == [[0.0, 1.0]]


def test_padding_is_zero_and_inputs_are_left_alone() -> None:
    q = torch.ones(3, 6)
    extended = augment_queries(q, 16)
    assert extended[:, :8].eq(1).all() and extended[:, 8:].eq(0).all() and q.shape == (3, 6)


def test_log_counts_are_exchanged_in_place() -> None:
    k, counts = torch.randn(2, 5, 6), torch.tensor([1.0, 2.0, 700.0, 3.0, 1.0]).log().expand(2, 5)
    kept = augment_keys(k, torch.zeros(2, 5), 16)
    write_log_counts(kept, counts, 6)
    assert torch.equal(kept, augment_keys(k, counts, 16))
