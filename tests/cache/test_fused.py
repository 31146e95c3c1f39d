"""The fused commit of `TempCache` against the plain one, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import cache
from fastar.ann.similarity import moment_factor, random_directions
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.benchmark.commit import FAST, CommitGeometry, StandIn, commit_rows, place, stage
from fastar.cache import fused
from fastar.cache.policy import SlotPolicy
from tests.dispatch import Watched
from tests.hopper import compile_apart

from .worlds import FLOAT, TOKENS, bound, random_chunk

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("only_where_triton_runs")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "last": {"key": "last"},
    "one_round": {"rounds": 1, "weighting": "ward"},
    "regions": {"sink_frames": 1, "recent_frames": 1, "weighting": "older"},
    "all_recent": {"recent_share": 0.0, "refresh": 0.0},
    "narrow": {"match_width": 16},
    "newest": {"match_width": 16, "cost_by": "searched", "match_frames": 1, "rounds": 1},
    "no_value": {"value_weight": 0.0, "weighting": "none", "rounds": 3},
}


def committed(
    policy: Any, device: torch.device, chunks: int = 5, layers: int = 1, heads: int = 1, **sizes: Any
) -> Any:
    """After commits of two frames; little of everything, since the interpreter takes its time."""
    bound(policy, device=device, layers=layers, batch=1, num_heads=heads, chunk_frames=2, **sizes)
    for number in range(chunks):
        for layer in range(layers):
            policy.stage(layer, few(random_chunk(1000 * layer + number, 2 * number, device=device), heads))
        if sizes:  # where attention leaves them
            for layer, chunk in policy.staged.items():
                place(policy, layer, chunk)
        policy.commit(2 * number, 2)
    return policy


def few(chunk: cache.Staged, heads: int) -> cache.Staged:
    q, q_raw, k, v = (x[:1, :heads] for x in (chunk.q_raw, chunk.k_raw, chunk.k, chunk.v))
    return cache.Staged(q, q_raw, k, v, chunk.positions)


def fields(policy: SlotPolicy, layer: int) -> dict[str, Tensor]:
    return dict(policy._buffers[layer].narrow(0, policy.filled).fields) | policy._extras[layer]


def by_age(policy: Any, layer: int) -> dict[str, Tensor]:
    """As `fields`, slots oldest first: fused commits keep them in another order."""
    return (
        dict(policy._by_age(policy._buffers[layer].narrow(0, policy.filled)).fields) | policy._extras[layer]
    )


@pytest.mark.parametrize("name", list(VARIANTS))
def test_fused_commits_are_the_plain_ones(name: str, device: torch.device) -> None:
    """Random float32 features have no near ties: the same slots merge, and numbers agree to rounding."""
    options = {"budget_frames": 12, **FLOAT, **VARIANTS[name]}
    layers, heads = 2 if name == "last" else 1, 2 if name == "default" else 1
    plain = committed(cache.TempCache(**options), device, layers=layers, heads=heads)
    together = committed(cache.TempCache(commit_by="fused", **options), device, layers=layers, heads=heads)
    assert plain.filled == together.filled == plain.capacity_slots()
    for layer in range(layers):
        expected, found = fields(plain, layer), by_age(together, layer)
        for field in ("position", "count", "partner"):
            assert torch.equal(expected[field], found[field]), field
        for field in ("key", "value", "moment", "observed"):
            torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-4)
        assert (found["count"] > 1).any()


def test_a_fused_commit_waits_for_nothing_and_writes_without_allocating() -> None:
    device = torch.device("cpu")
    policy = committed(cache.TempCache(commit_by="fused", budget_frames=8), device, chunks=4)
    before = policy.state_dict()
    policy.stage(0, few(random_chunk(9, 8), 1))
    prepared = policy.prepare(8, 2)
    for name, x in policy.state_dict().items():
        assert torch.equal(before[name], x) if isinstance(x, Tensor) else before[name] == x
    with Watched() as watched:
        policy.finish(prepared, 8, 2)
    assert not watched.waiting and policy.filled == policy.capacity_slots()


def test_the_same_bits_however_layers_go_together_and_wherever_arrivals_lie(device: torch.device) -> None:
    options: dict[str, Any] = {"commit_by": "fused", "budget_frames": 12, "rounds": 1, **FLOAT}
    apart = committed(cache.TempCache(layers_at_once=1, **options), device, layers=2)
    together = committed(cache.TempCache(**options), device, layers=2, key_width=16)
    assert together._buffers.keys_values(0)[0].shape[-1] == 16
    for layer in range(2):
        expected, found = fields(apart, layer), fields(together, layer)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_moments_and_their_factors(device: torch.device) -> None:
    x = torch.randn(1, 2, 70, 12, device=device)
    rope, positions = RotaryEmbedding(12), grid_positions(3, 1, (7, 10), device=device)
    x = rope.rotate(x, positions)
    turned = x.flatten(0, 1)
    sums, squares = fused.moments(x.transpose(1, 2).contiguous().transpose(1, 2), span=64)
    torch.testing.assert_close(sums, turned.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, turned.mT @ turned, rtol=1e-4, atol=1e-4)
    sums, squares = fused.moments(x, full=False)
    torch.testing.assert_close(squares, x.flatten(0, 1).square().sum(1), rtol=1e-4, atol=1e-4)
    moment = turned.mT @ turned / 70
    moment[1] -= 2 * torch.eye(12, device=device)  # not positive definite
    torch.testing.assert_close(
        fused.moment_factors(moment), moment_factor(moment) * 12**-0.5, rtol=1e-3, atol=1e-4
    )


def test_directions_are_orthonormal() -> None:
    plane = random_directions(0, 24, 16, torch.device("cpu"))
    torch.testing.assert_close(plane.T @ plane, torch.eye(16))
    with pytest.raises(ValueError, match="ask for fewer"):
        random_directions(0, 8, 16, torch.device("cpu"))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"commit_by": "gpu"}, "plain, fused"),
        ({"commit_by": "fused", "per_head": False}, "needs per_head=True, got False"),
        ({"commit_by": "fused", "match_space": "raw"}, "match_space=roped, got raw"),
        ({"commit_by": "fused", "key": "medoid"}, "key=mean or last"),
        ({"commit_by": "fused", "slot_bits": 8}, "slot_bits=16, got mean and 8"),
        ({"match_width": 24}, "power of two"),
        ({"match_frames": 0}, "match_frames must be at least 1, got 30 and 0"),
        ({"cost_by": "all"}, "features, searched"),
        ({"commit_by": "fused", "cost_by": "searched", "key": "last"}, "needs key=mean, got last"),
        ({"commit_by": "fused", "layers_at_once": 0}, "must be at least 1, got 0 and None"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.TempCache(budget_frames=9, **options)  # type: ignore[arg-type]
    monkeypatch.setattr("fastar.cache.fused_commit.interpreted", lambda: False)
    policy = cache.TempCache(budget_frames=6, commit_by="fused")
    with pytest.raises(ValueError, match="not on cpu: set commit_by=plain"):
        committed(policy, torch.device("cpu"), chunks=1)


def test_commits_of_several_chunks_are_plain(device: torch.device) -> None:
    """The plain path keeps more digits; one takes over what fused commits left in another order."""
    found = []
    for steps in ((2, 2, 2, 2, 4), (8, 4)):
        policy = cache.TempCache(commit_by="fused", budget_frames=10, rounds=1, **FLOAT)
        bound(policy, device=device, layers=1, batch=1, num_heads=1, chunk_frames=2)
        first = 0
        for step in steps:
            chunk = few(random_chunk(0, 0, 12, device=device), 1)
            part = slice(first * TOKENS, (first + step) * TOKENS)
            vectors = (x[:, :, part] for x in (chunk.q_raw, chunk.k_raw, chunk.k, chunk.v))
            policy.stage(0, cache.Staged(*vectors, positions=chunk.positions[part]))
            policy.commit(first, step)
            first += step
        found.append(fields(policy, 0))
    for name in ("position", "count", "partner"):
        assert torch.equal(found[0][name], found[1][name]), name
    for name in ("key", "value"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-4)


def test_after_a_rewrite_no_slot_enters_twice(device: torch.device) -> None:
    """Recent frames are dropped and committed again, and the state goes on in a plain cache: as if that were so."""
    options: dict[str, Any] = {"budget_frames": 12, "rounds": 1, "refresh": 0.0, "recent_frames": 4, **FLOAT}
    fused_policy = committed(cache.TempCache(commit_by="fused", **options), device)
    plain = committed(cache.TempCache(**options), device)
    for policy in (fused_policy, plain):
        policy.drop_from(8)
        for frame in (8, 10):
            policy.stage(0, few(random_chunk(frame, frame, device=device), 1))
            policy.commit(frame, 2)
    other = bound(cache.TempCache(**options), device=device, layers=1, batch=1, num_heads=1, chunk_frames=2)
    other.load_state_dict(fused_policy.state_dict())
    for found in (by_age(fused_policy, 0), fields(other, 0)):
        for name, expected in fields(plain, 0).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_the_benchmark_times_every_step(device: torch.device) -> None:
    geometry = CommitGeometry(layers=1, heads=1, head_dim=16, grid=(2, 3))
    options = {"rounds": 1, "refresh": 0.0}
    (row,) = commit_rows([14], options, geometry, device=device, repeats=1)
    assert row["contents"] == "stand-in" and row["slots"] > 11 * 6
    assert all(row[name] > 0 for name in ("features", "match", "merge", "renew", "edit", "total"))
    assert ("graph" in row) == (device.type == "cuda")


def test_the_benchmark_and_the_config_mean_the_same_setting(composed: Callable[..., Any]) -> None:
    config = composed("cache/tempcache_fast").cache
    assert {name: config[name] for name in FAST} == FAST and config.commit_by == "fused"


GEOMETRY = CommitGeometry(layers=2, heads=4, grid=(15, 26))


def rollout(options: dict[str, Any], chunks: int = 6) -> Any:
    """A policy at a real head's size on the GPU, after commits of stand-ins, with one more staged."""
    device = torch.device("cuda")
    policy = cache.TempCache(budget_frames=9, **options)
    policy.bind(GEOMETRY.spec(device))
    contents = StandIn(GEOMETRY, device)
    for _ in range(chunks):
        stage(policy, contents.chunk())
        policy.commit(policy.next_frame, GEOMETRY.chunk_frames)
    stage(policy, contents.chunk())
    return policy


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"match_width": 64}, FAST, FAST | {"match_frames": 1}],
    ids=["all", "few", "fast", "newest"],
)
def test_on_the_gpu_fused_merges_cost_what_plain_ones_do(options: dict[str, Any]) -> None:
    """Features of 16 bits settle near ties in another way: other slots merge here and there, at the same cost."""
    error = {}
    dense = cache.DenseCache()
    dense.bind(GEOMETRY.spec(torch.device("cuda")))
    contents = StandIn(GEOMETRY, torch.device("cuda"))
    for _ in range(6):
        stage(dense, contents.chunk())
        dense.commit(dense.next_frame, GEOMETRY.chunk_frames)
    q = dense.view(0).k[:, :, -500:].float()

    def attended(view: cache.CacheView) -> Tensor:
        bias = 0 if view.log_count is None else view.log_count[:, :, None]
        return ((q @ view.k.float().mT) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ view.v.float()

    expected = attended(dense.view(0))
    for by in ("plain", "fused"):
        policy = rollout({"commit_by": by, **options})
        assert policy.filled == policy.capacity_slots()
        found = policy.view(0)
        tokens = found.log_count.double().exp().sum(-1)
        assert (tokens - 18 * 15 * 26).abs().max() < 1e-2
        error[by] = float((attended(found) - expected).norm() / expected.norm())
    assert error["fused"] < 1.05 * error["plain"] and error["plain"] < 1.05 * error["fused"]


@pytest.mark.gpu
def test_a_full_cache_commits_in_a_graph() -> None:
    """Captured once and replayed, on what was staged at capture: the bits of an eager commit, and again of another."""
    options = {"commit_by": "fused", **FAST}
    eager, captured = rollout(options), rollout(options)
    before = captured.state_dict()
    staged = dict(captured._staged)
    captured.commit(18, 3)  # what is compiled and kept at the first call is not captured
    captured.load_state_dict(before)
    captured._staged.update(staged)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured._take_in(captured._commit_layers(fused_scratch()))
    for _ in range(2):
        eager._staged.update(staged)
        with torch.no_grad():
            eager._take_in(eager._commit_layers(fused_scratch()))
        graph.replay()
        for layer in range(GEOMETRY.layers):
            expected, found = fields(eager, layer), fields(captured, layer)
            assert all(torch.equal(expected[name], found[name]) for name in expected)


def fused_scratch() -> Any:
    from fastar.cache.change import Scratch

    return Scratch()


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Needs no GPU."""
    assert compile_apart("tests.cache.compile_kernels", tmp_path) == 24
