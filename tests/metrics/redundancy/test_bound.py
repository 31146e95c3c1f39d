"""Merges move the output of attention by no more than the bound says, and two tokens attain it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind
from fastar.attention.events import AttendEvent
from fastar.cache import DenseCache, TempCache, WindowCache
from fastar.cache.lineage import DROPPED
from fastar.engines.reference import attention_weights
from fastar.metrics.recall import member_counts
from fastar.metrics.redundancy import BoundProbe
from fastar.metrics.redundancy.bound import displacement, output_bounds
from fastar.rollout.protocols import TeeCache
from tests.small import HEADS, LAYERS, clip, small_backbone, small_rollout


def method_call(q: Tensor, k: Tensor, v: Tensor, log_count: Tensor | None) -> AttendEvent:
    context = PassContext(PassKind.DENOISE, 0, 1, (1000.0,))
    out = attention_weights(q, k, log_count=log_count) @ v
    return AttendEvent("self", 0, context, q, k, v, log_count, None, out, k.shape[2])


def errors_and_bounds(
    q: Tensor, k: Tensor, v: Tensor, call: AttendEvent, assignment: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|o' - o| of each query, its bound, the worst case and the first-order estimate."""
    weights = attention_weights(q, k)
    error = (call.out - weights @ v).norm(dim=-1)
    return error, *output_bounds(q, weights, v, displacement(k, v, call, assignment))


def merged(k: Tensor, v: Tensor, assignment: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last key, mean value and log-count of each slot; -inf where it has no member."""
    counts = member_counts(assignment, slots)
    index = assignment.clamp(min=0)[..., None].expand_as(k)
    kept = (assignment != DROPPED)[..., None]
    keys, values = (torch.zeros(*k.shape[:2], slots, k.shape[3]) for _ in range(2))
    for token in range(k.shape[2]):
        row = index[:, :, token : token + 1]
        keys = torch.where(
            kept[:, :, token : token + 1], keys.scatter(2, row, k[:, :, token : token + 1]), keys
        )
        values = values.scatter_add(2, row, (v * kept)[:, :, token : token + 1])
    return keys, values / counts.clamp(min=1)[..., None], counts.float().log()


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("case", ["merged", "dropped", "no log-count", "other values"])
def test_the_bound_holds_for_random_merges(scale: float, case: str) -> None:
    generator = torch.Generator().manual_seed(5)
    q, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (6, 12))
    centres = torch.randn(2, 3, 4, 8, generator=generator)
    assignment = torch.randint(4, (2, 3, 12), generator=generator)
    k = centres.gather(2, assignment[..., None].expand(-1, -1, -1, 8))
    k = k + scale * torch.randn(k.shape, generator=generator)
    if case == "dropped":
        assignment[..., :4] = DROPPED
    keys, values, log_count = merged(k, v, assignment, 4)
    if case == "no log-count":
        log_count = torch.where(log_count > -torch.inf, 0.0, -torch.inf)
    if case == "other values":
        values = values + 0.1
    call = method_call(q, keys, values, log_count)
    error, bound, worst, _ = errors_and_bounds(q, k, v, call, assignment)
    assert (error > 1e-4).any()
    assert (error <= bound * (1 + 1e-5) + 1e-6).all() and (bound <= worst).all()


def test_exact_duplicates_cost_nothing() -> None:
    q, k, v = (torch.randn(1, 1, n, 4) for n in (5, 3, 6))
    k, assignment = k.repeat(1, 1, 2, 1), torch.arange(3).repeat(2)[None, None]
    keys, values, log_count = merged(k, v, assignment, 3)
    error, *bounds = errors_and_bounds(q, k, v, method_call(q, keys, values, log_count), assignment)
    for found in (error, *bounds):
        assert found.max().item() < 1e-5


@pytest.mark.parametrize("change", [0.1, 1.0, 4.0])
def test_two_tokens_attain_the_bound(change: float) -> None:
    """One logit rises, the other falls, from the distribution that moves most: tanh(e / 2) in total variation."""
    share = 1 / (1 + math.exp(change))
    q, v = torch.tensor([[[[1.0]]]]), torch.tensor([[[[3.0], [-1.0]]]])
    k = torch.tensor([[[[math.log(share)], [math.log(1 - share)]]]])
    call = method_call(q, k + torch.tensor([[change], [-change]]), v, None)
    error, bound, _, _ = errors_and_bounds(q, k, v, call, torch.tensor([[[0, 1]]]))
    assert error.item() == pytest.approx(4 * math.tanh(change / 2), rel=1e-4)
    assert bound.item() == pytest.approx(error.item(), rel=1e-4)


def test_the_estimate_is_right_for_small_changes() -> None:
    q, k, v = (torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 5))
    moved = k.clone()
    moved[..., 2, :] += 1e-3 * torch.randn(4)
    error, _, _, estimate = errors_and_bounds(
        q, k, v, method_call(q, moved, v, None), torch.arange(5)[None, None]
    )
    torch.testing.assert_close(error, estimate, rtol=0.01, atol=0)  # one token moves: nothing cancels


def probed(caches: Sequence, *, frames: int = 12) -> BoundProbe:  # type: ignore[type-arg]
    """Bounds at the last chunk of a dense rollout that fills the caches."""
    backbone = small_backbone()
    teacher = small_rollout(backbone, lambda: TeeCache(DenseCache(storage="float32"), list(caches)))
    students = {str(n): small_rollout(backbone, lambda c=c: c) for n, c in enumerate(caches)}  # type: ignore[misc]
    probe = BoundProbe({name: student.state for name, student in students.items()}, LAYERS, HEADS)

    class Show:
        def on_attend(self, event: AttendEvent) -> None:
            for name, student in students.items():
                probe.look(name, event, student.state.replay(event))

    latents, actions = clip(frames)
    teacher.prefill(latents[:, : frames - 2], actions[:, : frames - 2])
    for student in students.values():
        student.follow(teacher)
    teacher.state.recorders.append(Show())
    teacher.denoise(actions[:, frames - 2 :])
    return probe


def test_caches_of_a_rollout_keep_to_their_bounds() -> None:
    caches = [
        DenseCache(storage="float32"),
        TempCache(budget_frames=12, storage="float32"),
        WindowCache(budget_frames=12, storage="float32"),
    ]
    probe = probed(caches)
    for name in probe.states:
        found = probe.compute(name)
        assert (found["output_error"] <= found["error_bound"] + 1e-5).all()
    assert probe.compute("0")["error_bound"].max().item() < 1e-4
    assert probe.compute("1")["output_error"].min().item() > 1e-4
    assert probe.compute("unknown") == {}
