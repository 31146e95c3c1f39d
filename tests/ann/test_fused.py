"""The Triton matchers against the plain ones, in Triton's interpreter where there is no GPU, and compiled for Hopper.

Whole numbers as features make every score exact in any order of additions, so that ties are ties and answers must be
equal to the bit; random features are compared by what they find.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastar import ann
from fastar.ann.base import Excluded, Matcher, Metric
from fastar.ann.launch import Tile
from tests.hopper import compile_apart

pytest.importorskip("triton")

SMALL = Tile(queries=16, keys=32, width=32, warps=4, stages=2)
METRICS: list[Metric] = ["dot", "euclidean"]


@pytest.fixture(autouse=True)
def _device_that_triton_takes(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is seen."""
    empty = torch.empty

    def poisoned(*args, **options) -> Tensor:  # type: ignore[no-untyped-def]
        tensor = empty(*args, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 123456789)

    monkeypatch.setattr(torch, "empty", poisoned)


def whole(*shape: int, device: torch.device, top: int = 3) -> Tensor:
    return torch.randint(-top, top + 1, shape).float().to(device)


def frames_excluded(problems: int, n: int, m: int, frame: int, device: torch.device) -> Excluded:
    """Every query's own frame of keys; for the first problem all up to it, as of slots that merge into newer ones."""
    low = (torch.arange(n) * m // n // frame * frame).expand(problems, -1).clone()
    high = (low + frame).clamp_max(m)
    low[0] = 0
    return low.to(device), high.to(device)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "width", "splits"), [
    (1, 1, 1, 1), (16, 32, 32, 1), (5, 97, 12, 4), (33, 70, 33, 3), (17, 100, 64, None), (4, 140, 100, 7),
])  # fmt: skip
def test_the_kernel_finds_the_first_best_key_as_exact_search_does(
    n: int, m: int, width: int, splits: int | None, metric: Metric, device: torch.device
) -> None:
    queries = whole(2, n, width, device=device, top=1)
    keys = whole(2, m, width, device=device, top=1)
    keys[:, m // 2 :] = keys[:, : m - m // 2]  # every key of the first half comes again
    matcher, exact = ann.TritonMatcher(tile=SMALL, splits=splits), ann.ExactMatcher()
    for valid in (None, torch.rand(2, m).to(device) > 0.5):
        if valid is not None:
            valid[1] = False  # nothing to be found there
        for excluded in (None, frames_excluded(2, n, m, 8, device)):
            expected = exact.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)
            found = matcher.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_the_features_are(dtype: torch.dtype, device: torch.device) -> None:
    queries, keys = (torch.randn(2, count, 48).to(device, dtype) for count in (20, 75))
    index, score = ann.TritonMatcher(tile=SMALL, splits=2).nearest(queries, keys, metric="euclidean")
    distance = (queries.double()[:, :, None] - keys.double()[:, None]).square().sum(-1)
    assert score.dtype == torch.float32 and torch.equal(index, distance.argmin(-1))
    torch.testing.assert_close(-score.double(), distance.amin(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bfloat16"])
def test_lower_precision_misses_near_ties_only(precision, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    keys = torch.randn(2, 90, 40, device=device) + 30  # far from the origin, as keys of a layer are
    queries = keys[:, :50] + 0.2 * torch.randn(2, 50, 40, device=device)
    matcher = ann.TritonMatcher(precision=precision, tile=SMALL)
    assert ann.recall_at_1(matcher, queries, keys, metric="euclidean") == 1


def test_a_tile_for_every_dtype_and_width(device: torch.device) -> None:
    for dtype, width in ((torch.float32, 40), (torch.bfloat16, 300), (torch.float16, 256)):
        queries, keys = (whole(1, count, width, device=device).to(dtype) for count in (20, 70))
        expected = ann.ExactMatcher().nearest(queries.float(), keys.float(), metric="euclidean")
        found = ann.TritonMatcher().nearest(queries, keys, metric="euclidean")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def matchers() -> list[Matcher]:
    return [
        ann.TritonMatcher(tile=SMALL),
        ann.TritonQuantizedMatcher(tile=SMALL),
        ann.TritonLSHMatcher(bits=3, tables=2, tile=SMALL),
        ann.TritonBinaryMatcher(bits=64, tile=SMALL),
    ]


def test_nothing_to_find_means_no_match(device: torch.device) -> None:
    queries, keys = torch.randn(2, 6, 8, device=device), torch.randn(2, 40, 8, device=device)
    valid = torch.ones(2, 40, dtype=torch.bool, device=device)
    valid[1] = False
    everything = (torch.zeros(1, 6, dtype=torch.long, device=device), torch.full((1, 6), 40, device=device))
    for matcher in matchers():
        for metric in METRICS:
            index, score = matcher.nearest(queries, keys, valid=valid, metric=metric)
            assert (index[1] == -1).all() and (score[1] == -math.inf).all()
            assert (index[0] >= 0).all() or isinstance(matcher, ann.TritonLSHMatcher)
        index, _ = matcher.nearest(queries, keys, excluded=everything)
        assert (index == -1).all()
        empty, _ = matcher.nearest(queries, keys[:, :0])
        assert empty.shape == (2, 6) and (empty == -1).all()
        assert matcher.nearest(queries[:, :0], keys)[0].shape == (2, 0)


def test_a_copy_is_found_and_the_first_of_equals_wins(device: torch.device) -> None:
    unique = whole(1, 20, 12, device=device)
    for matcher in matchers():
        index, _ = matcher.nearest(unique, unique.repeat(1, 4, 1), metric="euclidean")
        assert torch.equal(index[0].cpu(), torch.arange(20))


@pytest.mark.parametrize(("bits", "tables", "radius", "metric"), [
    (4, 2, 0, "dot"), (3, 2, 1, "euclidean"), (3, 1, 2, "dot"), (12, 1, 0, "euclidean"),
])  # fmt: skip
def test_buckets_hold_the_same_candidates_as_comparing_all_codes(
    bits: int, tables: int, radius: int, metric: Metric, device: torch.device
) -> None:
    queries, keys = whole(2, 20, 10, device=device), whole(2, 70, 10, device=device)
    keys[:, 35:] = keys[:, :35]
    valid = torch.rand(2, 70).to(device) > 0.2
    plain = ann.LSHMatcher(bits=bits, tables=tables, radius=radius, seed=3)
    fused = ann.TritonLSHMatcher(bits=bits, tables=tables, radius=radius, seed=3, tile=SMALL)
    for excluded in (None, frames_excluded(2, 20, 70, 10, device)):
        expected = plain.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)
        found = fused.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert (found[0] >= 0).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_are_compared_in_whole_numbers(bits: int, metric: Metric, device: torch.device) -> None:
    """Against a search by hand in int64, which ties as the kernel does; and near the plain matcher's floats."""
    queries, keys = torch.randn(2, 30, 40, device=device), 2 * torch.randn(2, 100, 40, device=device) + 1
    centre, top = keys.mean(1, keepdim=True), 2 ** (bits - 1) - 1
    sides = [queries - centre if metric == "euclidean" else queries, keys - centre]
    scales = [side.abs().amax(dim=(1, 2), keepdim=True) / top for side in sides]
    q, k = ((side / scale).round().long().cpu() for side, scale in zip(sides, scales, strict=True))
    product = (q @ k.mT).double() * (scales[0] * scales[1]).double().cpu()
    if metric == "euclidean":
        product -= 0.5 * (k.square().sum(-1) * scales[1][..., 0].double().cpu().square())[:, None]
    index, _ = ann.TritonQuantizedMatcher(bits=bits, tile=SMALL, splits=3).nearest(
        queries, keys, metric=metric
    )
    best = product.amax(-1)
    torch.testing.assert_close(product.gather(2, index.cpu()[..., None])[..., 0], best, rtol=1e-6, atol=1e-5)
    plain = ann.QuantizedMatcher(bits=bits).nearest(queries, keys, metric=metric)[0]
    assert (index == plain).float().mean() > 0.95


@pytest.mark.parametrize("metric", METRICS)
def test_binary_search_counts_the_bits_that_differ(metric: Metric, device: torch.device) -> None:
    queries, keys = torch.randn(2, 30, 12, device=device), torch.randn(2, 70, 12, device=device) + 1
    valid = torch.rand(2, 70).to(device) > 0.3
    excluded = frames_excluded(2, 30, 70, 10, device)
    planes = torch.randn(12, 64, generator=torch.Generator().manual_seed(5)).to(device)
    centre = (keys * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    q, k = (queries - centre if metric == "euclidean" else queries) @ planes > 0, (keys - centre) @ planes > 0
    differ = (q[:, :, None] != k[:, None]).sum(-1).double()
    inside = torch.arange(70, device=device)
    differ.masked_fill_(~valid[:, None], math.inf)
    differ.masked_fill_((inside >= excluded[0][..., None]) & (inside < excluded[1][..., None]), math.inf)
    matcher = ann.TritonBinaryMatcher(bits=64, seed=5, tile=SMALL, splits=2)
    index, score = matcher.nearest(queries, keys, valid=valid, excluded=excluded, metric=metric)
    least = differ.amin(-1)
    assert torch.equal(index, torch.where(least < math.inf, differ.argmin(-1), -1))
    assert torch.equal(score.double(), -least if metric == "euclidean" else 64 - 2 * least)


def test_recall_counts_equal_keys_as_found(device: torch.device) -> None:
    keys = torch.randn(1, 60, 16).to(device)  # the same numbers on any device
    queries = keys[:, :30] + 0.3 * torch.randn(1, 30, 16).to(device)
    coarse = ann.TritonQuantizedMatcher(bits=2, tile=SMALL)
    exact, found = (m.nearest(queries, keys)[0] for m in (ann.ExactMatcher(), coarse))
    assert ann.recall_at_1(coarse, queries, keys) == (exact == found).float().mean() < 1
    rest = torch.arange(30, device=device)[None]
    # whatever is found among copies of one key is right, and queries without a key do not count
    copies = keys[:, :1].expand(-1, 60, -1)
    assert ann.recall_at_1(coarse, queries, copies, excluded=(0 * rest, 2 * rest)) == 1
    assert ann.recall_at_1(coarse, queries, copies, excluded=(0 * rest, 0 * rest + 60)).isnan()
    fine = [ann.TritonBinaryMatcher(bits=b, tile=SMALL) for b in (32, 512)]
    recall = [float(ann.recall_at_1(m, queries, keys, metric="euclidean")) for m in fine]
    assert recall[0] < recall[1]


def test_settings_and_devices_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, message in (
        (lambda: ann.TritonMatcher(precision="fp8"), "ieee, tf32x3"),  # type: ignore[arg-type]
        (lambda: ann.TritonQuantizedMatcher(bits=9), "got 9"),
        (lambda: ann.TritonLSHMatcher(radius=8), "got 8"),
        (lambda: ann.TritonBinaryMatcher(bits=40), "multiple of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with monkeypatch.context() as patch:
        patch.setattr("fastar.ann.launch.interpreted", lambda: False)
        with pytest.raises(ValueError, match="not on cpu: choose ann=exact"):
            ann.TritonMatcher().nearest(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    monkeypatch.setattr("fastar.ann.launch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install triton"):
        ann.TritonMatcher()


@pytest.mark.parametrize("name", ["triton", "triton_quantized", "triton_lsh", "triton_binary"])
def test_configured_matchers(name: str, composed: Callable[..., object]) -> None:
    from hydra.utils import instantiate

    policy = instantiate(composed("cache/tempcache", f"ann@cache.matcher={name}").cache)  # type: ignore[attr-defined]
    assert type(policy.matcher).__name__.lower() == name.replace("_", "") + "matcher"


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In a process without the interpreter, which replaces the compiler. Needs no GPU."""
    assert compile_apart("tests.ann.compile_kernels", tmp_path) == 13
