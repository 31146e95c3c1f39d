"""Attention of methods held against dense attention at the same calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone
from fastar.cache import CachePolicy, DenseCache, EmptyCache, TempCache, WindowCache
from fastar.cache.slots import pack_positions
from fastar.compare.lockstep import evenly
from fastar.engines.reference import attention_weights
from fastar.metrics import attention
from fastar.metrics.attention import AttentionProbe
from fastar.rollout.protocols import TeeCache, lockstep_a
from fastar.sparsity import RandomBlocks, Selector
from tests.small import clip, small_backbone, small_rollout

HISTORY, FRAMES, SEEDS = 12, 16, (3, 9)
FLOAT = {"storage": "float32"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


class Calls:
    """Keeps the teacher's calls in the chunks that are looked at."""

    def __init__(self, probe: AttentionProbe) -> None:
        self.probe, self.events = probe, []  # type: ignore[var-annotated]

    def on_attend(self, event: AttendEvent) -> None:
        if self.probe.active:
            self.events.append(replace(event, k=event.k.clone()))  # the next step writes its own chunk there


def look(
    backbone: Backbone, methods: dict[str, tuple[CachePolicy, dict[str, Callable[[], Selector]]]]
) -> tuple[dict[str, dict[str, list[float]]], list[AttendEvent], dict[str, Any]]:
    """Scores of the last chunk by method, the dense calls there, and the caches as they were."""
    latents, actions = clip(FRAMES, batch=2)
    followers = [cache for cache, _ in methods.values()]
    teacher = small_rollout(backbone, lambda: TeeCache(DenseCache(**FLOAT), followers), seeds=SEEDS)
    students = {
        name: small_rollout(backbone, lambda cache=cache: cache, seeds=SEEDS, **options)  # type: ignore[misc]
        for name, (cache, options) in methods.items()
    }
    probe = AttentionProbe({name: student.state for name, student in students.items()})
    calls = Calls(probe)
    teacher.state.recorders += [probe, calls]
    found, views = {}, {}
    steps = lockstep_a(teacher, students, latents, actions, HISTORY, look_at=[FRAMES - 2], probe=probe)
    for first, name, _ in steps:
        if first == FRAMES - 2:
            found[name] = probe.scores(name)
            views[name] = students[name].state.cache.view(0)
    return found, calls.events, views


def test_dense_keeps_all_attention_and_an_empty_cache_only_the_current_chunk(backbone: Backbone) -> None:
    methods = {
        "dense": (DenseCache(**FLOAT), {}),
        "roomy": (TempCache(budget_frames=60, **FLOAT), {}),
        "window": (WindowCache(budget_frames=20, **FLOAT), {}),
        "merged": (TempCache(budget_frames=20, **FLOAT), {}),
        "empty": (EmptyCache(), {}),
    }
    found, events, _ = look(backbone, methods)
    for name in ("dense", "roomy"):
        assert found[name]["recall"] == pytest.approx([1.0, 1.0])
        assert found[name]["output_error"] == pytest.approx([0.0, 0.0], abs=1e-6)
    for clip_number in range(2):
        recall = [found[name]["recall"][clip_number] for name in ("empty", "window", "roomy")]
        assert recall == sorted(recall) and recall[1] < 0.999
        assert 0 < found["merged"]["recall"][clip_number] < 1
        error = [found[name]["output_error"][clip_number] for name in ("roomy", "window", "empty")]
        assert error == sorted(error)
    dense = [attention_weights(event.q, event.k)[..., -event.q.shape[2] :].sum(-1) for event in events]
    expected = torch.stack(dense).mean(dim=(0, 2, 3))
    assert found["empty"]["recall"] == pytest.approx(expected.tolist())


def test_the_recall_of_a_window_is_the_dense_attention_on_what_it_keeps(backbone: Backbone) -> None:
    found, events, views = look(backbone, {"window": (WindowCache(budget_frames=20, **FLOAT), {})})
    kept = pack_positions(views["window"].positions[0, 0])
    slots = len(kept) + events[0].q.shape[2]
    recalls: list[Tensor] = [attention_weights(e.q, e.k)[..., -slots:].sum(-1) for e in events]
    expected = torch.stack(recalls).mean(dim=(0, 2, 3))
    assert found["window"]["recall"] == pytest.approx(expected.tolist())


def test_a_selector_loses_what_it_does_not_compute(backbone: Backbone) -> None:
    def sparse(density: float) -> dict[str, Callable[[], Selector]]:
        return {
            "selector": lambda: RandomBlocks(
                density=density, block_q=4, block_k=4, warmup_share=0.0, min_dense_steps=0
            )
        }

    methods = {name: (DenseCache(**FLOAT), sparse(share)) for name, share in (("half", 0.5), ("all", 1.0))}
    found, _, _ = look(backbone, methods)
    assert found["all"]["recall"] == pytest.approx([1.0, 1.0])
    assert max(found["half"]["recall"]) < 0.95 and min(found["half"]["output_error"]) > 1e-3


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [20]), (2, [12, 20]), (3, [8, 12, 20]), (9, [8, 12, 16, 20])]
)
def test_chunks_to_look_at_are_spread_and_end_with_the_last(count: int, expected: list[int]) -> None:
    assert evenly(8, 24, 4, count) == expected


def test_heads_taken_in_parts_score_the_same(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> dict[str, dict[str, list[float]]]:
        def blocks() -> RandomBlocks:
            return RandomBlocks(density=0.5, block_q=4, block_k=4)

        return look(
            backbone,
            {
                "tempcache": (TempCache(budget_frames=6), {}),
                "blocks": (DenseCache(**FLOAT), {"selector": blocks}),
            },
        )[0]

    whole = scores()
    monkeypatch.setattr(attention, "LARGEST", 1)
    parts = scores()
    for name, found in whole.items():
        assert 0 < found["recall"][0] < 1
        for metric, numbers in found.items():
            assert parts[name][metric] == pytest.approx(numbers, rel=1e-5)
