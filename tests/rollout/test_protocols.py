"""Protocols A and B: dense reproduces its own trajectory; a student on a dense cache is dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastar.backbones import Backbone
from fastar.cache import CachePolicy, DenseCache, EmptyCache, TempCache, WindowCache
from fastar.rollout.protocols import TeeCache, extend_trajectory, lockstep_a, lockstep_b
from fastar.rollout.rollout import Rollout
from fastar.sparsity import RandomBlocks
from tests.small import clip, small_backbone, small_rollout

HISTORY, GENERATED = 4, 6
SEEDS = (3, 9)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture(scope="module")
def trajectory(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Dense frames after true history, and all actions."""
    latents, actions = clip(HISTORY + GENERATED, batch=2)
    rollout = small_rollout(backbone, seeds=SEEDS)
    return extend_trajectory(rollout, latents[:, :HISTORY], actions, GENERATED), actions


def exact() -> DenseCache:
    return DenseCache(storage="float32")


def protocol_a(
    backbone: Backbone, caches: dict[str, CachePolicy], trajectory: tuple[Tensor, Tensor], **options: object
) -> tuple[dict[str, Tensor], Rollout]:
    """Denoised chunks of every method in a row, and the teacher."""
    tee = TeeCache(exact(), list(caches.values()))
    teacher = small_rollout(backbone, lambda: tee, seeds=SEEDS)
    students = {
        name: small_rollout(backbone, lambda cache=cache: cache, seeds=SEEDS, **options)  # type: ignore[arg-type, misc]
        for name, cache in caches.items()
    }
    chunks: dict[str, list[Tensor]] = {name: [] for name in caches}
    expected = [(at, name) for at in range(HISTORY, HISTORY + GENERATED, 2) for name in caches]
    seen = []
    for first, name, chunk in lockstep_a(teacher, students, *trajectory, HISTORY):
        seen.append((first, name))
        chunks[name].append(chunk)
    assert seen == expected
    return {name: torch.cat(parts, dim=1) for name, parts in chunks.items()}, teacher


def protocol_b(backbone: Backbone, cache: CachePolicy, trajectory: tuple[Tensor, Tensor]) -> Tensor:
    rollout = small_rollout(backbone, lambda: cache, seeds=SEEDS)
    steps = list(lockstep_b(rollout, *trajectory, HISTORY))
    assert [first for first, _ in steps] == [4, 6, 8] and rollout.next_frame == HISTORY + GENERATED
    return torch.cat([chunk for _, chunk in steps], dim=1)


def test_a_trajectory_is_its_history_then_dense_frames(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    video, actions = trajectory
    latents, _ = clip(HISTORY + GENERATED, batch=2)
    assert video.shape[1] == HISTORY + GENERATED and torch.equal(video[:, :HISTORY], latents[:, :HISTORY])
    rollout = small_rollout(backbone, exact, seeds=SEEDS)
    rollout.prefill(latents[:, :HISTORY], actions[:, :HISTORY])
    assert torch.equal(
        torch.cat(list(rollout.generate(GENERATED, actions[:, HISTORY:])), dim=1), video[:, HISTORY:]
    )


def test_dense_reproduces_its_trajectory_in_both_protocols(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    video, _ = trajectory
    a, teacher = protocol_a(backbone, {"dense": exact()}, trajectory)
    assert torch.equal(a["dense"], video[:, HISTORY:])
    assert torch.equal(protocol_b(backbone, exact(), trajectory), video[:, HISTORY:])
    assert teacher.next_frame == HISTORY + GENERATED


def test_a_trajectory_of_generated_frames_alone_begins_at_frame_0(backbone: Backbone) -> None:
    """The first chunk is denoised on an empty cache in both protocols, also by a run that is taken up after it."""
    latents, actions = clip(GENERATED, batch=2)
    generated = extend_trajectory(
        small_rollout(backbone, exact, seeds=SEEDS), latents[:, :0], actions, GENERATED
    )
    free = small_rollout(backbone, exact, seeds=SEEDS).generate(GENERATED, actions)
    assert torch.equal(generated, torch.cat(list(free), dim=1))
    for done in (0, 1):
        caches: dict[str, CachePolicy] = {"dense": exact(), "empty": EmptyCache()}
        teacher = small_rollout(
            backbone, lambda own=caches: TeeCache(exact(), list(own.values())), seeds=SEEDS
        )
        students = {
            name: small_rollout(backbone, lambda cache=cache: cache, seeds=SEEDS)
            for name, cache in caches.items()
        }
        a = list(lockstep_a(teacher, students, generated, actions, 0, done=done))
        b = [
            (first, name, chunk)
            for name in students
            for first, chunk in lockstep_b(
                small_rollout(backbone, {"dense": exact, "empty": EmptyCache}[name], seeds=SEEDS),
                generated, actions, 0, done=done,
            )
        ]  # fmt: skip
        for found in (a, b):
            assert sorted((first, name) for first, name, _ in found) == [
                (first, name) for first in range(2 * done, GENERATED, 2) for name in ("dense", "empty")
            ]
            for first, name, chunk in found:
                same = torch.equal(chunk, generated[:, first : first + 2])
                assert same == (name == "dense" or first == 0), "the past is all that the empty cache lacks"


def test_room_for_everything_is_dense_and_an_empty_cache_is_not(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    video, _ = trajectory
    caches = {
        "window": WindowCache(budget_frames=60, storage="float32"),
        "empty": EmptyCache(),
        "tempcache": TempCache(budget_frames=60, storage="float32"),
    }
    a, _ = protocol_a(backbone, caches, trajectory)
    assert torch.equal(a["window"], video[:, HISTORY:]) and torch.equal(a["tempcache"], video[:, HISTORY:])
    assert (a["empty"] - video[:, HISTORY:]).abs().max() > 0.1
    b = protocol_b(backbone, TempCache(budget_frames=60, storage="float32"), trajectory)
    assert torch.equal(b, video[:, HISTORY:])


def test_a_commits_dense_keys_and_b_the_methods_own(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    """In A a follower holds what the teacher's dense passes computed; in B later layers differ."""
    window = WindowCache(budget_frames=4)
    _, teacher = protocol_a(backbone, {"window": window}, trajectory)
    tee = teacher.state.cache
    assert isinstance(tee, TeeCache) and tee.bytes_used() == tee.leader.bytes_used() > window.bytes_used()
    kept = window.slots_used()
    dense = tee.leader.view(1).k[:, :, -kept:]
    assert torch.equal(window.view(1).k, dense.bfloat16().float())

    own = WindowCache(budget_frames=4)
    protocol_b(backbone, own, trajectory)
    assert torch.equal(own.view(0).k, window.view(0).k), "the first layer's keys see no history"
    assert (own.view(1).k - window.view(1).k).abs().max() > 1e-2


def test_one_teacher_serves_methods_independently(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    alone, _ = protocol_a(backbone, {"window": WindowCache(budget_frames=4)}, trajectory)
    caches = {
        "tempcache": TempCache(budget_frames=8),
        "window": WindowCache(budget_frames=4),
        "empty": EmptyCache(),
    }
    together, _ = protocol_a(backbone, caches, trajectory)
    assert torch.equal(alone["window"], together["window"])


def test_a_sparse_student_on_a_dense_cache_differs_by_its_attention_alone(
    backbone: Backbone, trajectory: tuple[Tensor, Tensor]
) -> None:
    video, _ = trajectory
    options = {"density": 0.3, "block_q": 4, "block_k": 4}
    sparse, _ = protocol_a(backbone, {"x": exact()}, trajectory, selector=lambda: RandomBlocks(**options))
    full, _ = protocol_a(
        backbone, {"x": exact()}, trajectory, selector=lambda: RandomBlocks(**options | {"density": 1.0})
    )
    assert torch.equal(full["x"], video[:, HISTORY:])
    assert 1e-3 < (sparse["x"] - video[:, HISTORY:]).abs().max() < 10


def test_a_tee_saves_and_restores_everyone(backbone: Backbone, trajectory: tuple[Tensor, Tensor]) -> None:
    video, actions = trajectory

    def teacher() -> tuple[Rollout, list[CachePolicy]]:
        followers: list[CachePolicy] = [TempCache(budget_frames=8), WindowCache(budget_frames=4)]
        return small_rollout(backbone, lambda: TeeCache(exact(), followers), seeds=SEEDS), followers

    first, followers = teacher()
    first.prefill(video[:, :8], actions[:, :8])
    second, restored = teacher()
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.commit(video[:, 8:], actions[:, 8:])
    for a, b in zip([first.state.cache, *followers], [second.state.cache, *restored], strict=True):
        assert torch.equal(a.view(1).k, b.view(1).k) and a.bytes_used() == b.bytes_used()
