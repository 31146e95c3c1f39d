"""Recall with merged slots and density, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.engines.plan import BlockPlan
from fastar.metrics.density import DensityRecorder, dense_bytes, dense_slots
from fastar.metrics.recall import (
    AttentionRecall,
    attention_recall,
    relative_output_error,
    spread_over_members,
)

# ---- recall


def test_recall_of_a_selector_is_the_mass_it_keeps() -> None:
    dense = torch.tensor([[0.5, 0.3, 0.2]])
    kept = torch.tensor([[0.5, 0.3, 0.0]]) / 0.8
    assert attention_recall(dense, kept).item() == pytest.approx(0.8)


def test_recall_of_merged_slots_by_hand() -> None:
    """Tokens 0 and 1 share slot 0, token 2 has slot 1, token 3 is dropped."""
    dense = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    slots = torch.tensor([[0.6, 0.4]])
    assignment = torch.tensor([0, 0, 1, -1])
    per_token = spread_over_members(slots, assignment)
    torch.testing.assert_close(per_token, torch.tensor([[0.3, 0.3, 0.4, 0.0]]))
    # min: 0.3 + 0.1 + 0.3 + 0
    assert attention_recall(dense, per_token).item() == pytest.approx(0.7)
    assert attention_recall(dense, per_token).item() == pytest.approx(
        1 - (dense - per_token).abs().sum().item() / 2
    )


def test_merging_tokens_of_equal_weight_loses_nothing() -> None:
    keys = torch.randn(2, 3, 6, 8).repeat_interleave(2, dim=2)  # every key twice
    queries = torch.randn(2, 3, 5, 8)
    dense = (queries @ keys.mT).softmax(-1)
    slots = (queries @ keys[:, :, ::2].mT + torch.tensor(2.0).log()).softmax(-1)
    assignment = torch.arange(12).div(2, rounding_mode="floor").expand(2, 3, 12)
    metric = AttentionRecall(num_layers=2)
    metric.update(0, dense, slots, assignment)
    assert metric.compute().item() == pytest.approx(1, abs=1e-6) and metric.per_layer()[1].isnan()


def test_recall_weighs_layers_alike() -> None:
    metric = AttentionRecall(num_layers=3)
    whole, half = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    metric.update(0, whole, whole)
    for _ in range(5):
        metric.update(2, whole, half)
    assert metric.compute().item() == pytest.approx(0.75)


def test_recall_refuses_weights_over_other_tokens() -> None:
    with pytest.raises(ValueError, match="over the same tokens"):
        attention_recall(torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="assignment must be int64"):
        spread_over_members(torch.ones(2, 1, 3), torch.zeros(3, dtype=torch.long))


def test_relative_output_error_by_hand() -> None:
    dense = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # norm 5
    assert relative_output_error(
        dense + torch.tensor([[0.5, 0.0], [0.0, 0.0]]), dense
    ).tolist() == pytest.approx([0.1])


# ---- density


def event(
    first_frame: int, *, keys: int, kind: PassKind = PassKind.DENOISE, plan: BlockPlan | None = None,
    log_count: Tensor | None = None, stream: str = "self",
) -> Any:  # fmt: skip
    """One call of 2 heads, with 3 tokens a frame and 2 frames a chunk."""
    context = PassContext(kind=kind, first_frame=first_frame, num_frames=2, timesteps=(0.0, 0.0))
    return SimpleNamespace(
        stream=stream, layer=0, context=context, q=torch.zeros(1, 2, 6, 4), k=torch.zeros(1, 2, keys, 4),
        log_count=log_count, plan=plan, candidates=keys,
    )  # fmt: skip


def test_density_of_a_bounded_cache_falls_with_length() -> None:
    recorder = DensityRecorder(tokens_per_frame=3)
    recorder.on_attend(event(0, keys=6))  # first chunk: all there is
    recorder.on_attend(event(2, keys=6 + 6))
    recorder.on_attend(event(4, keys=6 + 6))  # from here on the cache holds 6 of the past tokens
    recorder.on_attend(event(4, keys=6 + 6, kind=PassKind.COMMIT))
    recorder.on_attend(event(8, keys=6 + 6))
    curve = recorder.curve()
    assert [point.frame for point in curve] == [0, 2, 4, 8]
    assert [point.density for point in curve] == pytest.approx([1, 1, 12 / 18, 12 / 30])
    assert recorder.mean() == pytest.approx((1 + 1 + 12 / 18 + 12 / 30) / 4)
    assert recorder.pooled() == pytest.approx((6 + 12 + 24 + 12) / (6 + 12 + 36 + 30))
    recorder.reset()
    with pytest.raises(ValueError, match="no attention call"):
        recorder.mean()


def test_density_counts_dense_steps_beside_sparse_ones() -> None:
    """One dense step and one that runs 2 of 2 x 3 blocks: 72 and 24 of 72 pairs a head."""
    order = torch.arange(6).expand(1, 2, 6)
    mask = torch.tensor([[True, False, False], [False, True, False]]).expand(1, 2, 2, 3)
    plan = BlockPlan(
        query_order=order, key_order=torch.arange(12).expand(1, 2, 12), block_q=3, block_k=4, block_mask=mask
    )
    recorder = DensityRecorder(tokens_per_frame=3)
    recorder.on_attend(event(2, keys=12))
    recorder.on_attend(event(2, keys=12, plan=plan))
    (point,) = recorder.curve()
    assert (point.executed, point.dense) == (2 * (72 + 24), 2 * 2 * 72)


def test_density_leaves_out_empty_slots_prefill_and_other_streams() -> None:
    log_count = torch.zeros(1, 2, 12)
    log_count[:, 0, 3:6] = float("-inf")
    log_count[:, 1, 5:6] = float("-inf")
    recorder = DensityRecorder(tokens_per_frame=3)
    recorder.on_attend(event(2, keys=12, log_count=log_count))
    recorder.on_attend(event(0, keys=6, kind=PassKind.PREFILL))
    recorder.on_attend(event(2, keys=5, stream="text"))
    (point,) = recorder.curve()
    assert (point.executed, point.dense) == (6 * (9 + 11), 6 * 24)
    text = DensityRecorder(tokens_per_frame=3, stream="text")
    text.on_attend(event(2, keys=5, stream="text"))
    assert text.mean() == 1


def test_size_of_a_dense_cache() -> None:
    """Wan2.1-1.3B at 480 x 832 (1560 tokens a latent frame): 0.268 GiB of keys and values per latent frame."""
    wan = {"frames": 1, "tokens_per_frame": 1560, "layers": 30, "batch": 1, "heads": 12}
    assert dense_bytes(**wan, head_dim=128) / 2**30 == pytest.approx(0.268, abs=5e-4)
    assert dense_slots(frames=21, tokens_per_frame=1560) == 32760
