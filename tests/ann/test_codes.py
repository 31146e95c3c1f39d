"""The kernel that gives tokens their buckets, against its definitions."""

from __future__ import annotations

import os

import pytest
import torch

from fastar import ann
from fastar.ann import codes

PROBLEMS, TOKENS = 3, 150


@pytest.fixture(autouse=True)
def _kernels_run(device: torch.device) -> None:
    pytest.importorskip("triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")


def vectors(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Off the origin, in a wider buffer."""
    x = torch.randn(PROBLEMS, TOKENS, width + 8) + 2 * torch.randn(PROBLEMS, 1, width + 8)
    return x.to(device, dtype)[..., :width]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("width", "bits"), [(16, 3), (128, 6), (200, 16)])
def test_signs(width: int, bits: int, centred: bool, device: torch.device) -> None:
    """A number so near to a plane that its side depends on how sums are rounded may fall on either."""
    x, planes = vectors(width, torch.float32, device), torch.randn(width, bits, device=device)
    centre = x.mean(1, keepdim=True) if centred else None
    found = codes.fused_sign_codes(x, planes, centre)
    side = ((x if centre is None else x - centre) @ planes).double()
    clear = (side.abs() > 1e-3).all(-1)
    assert clear.float().mean() > 0.8
    assert torch.equal(found[clear], codes.codes_of(side)[clear]) and found.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "count"), [(16, 5), (128, 32), (200, 100)])
def test_nearest_centroids(width: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
    x, centroids = vectors(width, dtype, device), torch.randn(PROBLEMS, count, width, device=device)
    centre = x.mean(1, keepdim=True)
    found = codes.fused_nearest_codes(x, centroids, centre)
    distance = torch.cdist((x.float() - centre.float()).double(), centroids.to(dtype).double()).square()
    best = distance.min(-1).values
    near = distance.gather(2, found[..., None]).squeeze(-1)
    assert (near - best).max() < 1e-3, "the nearest, or one as near"


def test_centroids_from_samples_are_as_good(device: torch.device) -> None:
    """Every third key: clusters are found all the same, empty slots do not count, and few keys are all taken."""
    centres = 20 * torch.randn(2, 5, 8)
    member = torch.arange(5).repeat_interleave(60).roll(30)  # each first centroid amid a cluster
    points = (centres[:, member] + torch.randn(2, 300, 8)).to(device)
    valid = torch.rand(2, 300, device=device) < 0.7
    junk = torch.where(valid[..., None], points, 1000.0)
    sampled = ann.KMeansBucketizer(clusters=5, iterations=10, samples=100)
    _, ids = sampled.buckets(points, junk, valid=valid)
    queries, _ = sampled.buckets(points, points)
    for problem, known in zip(ids.cpu(), valid.cpu(), strict=True):
        kept, of = problem[known], member[known]
        assert torch.equal(kept[:, None] == kept, of[:, None] == of)
    assert queries.shape == (2, 300)
    everything = ann.KMeansBucketizer(clusters=5, iterations=3)
    whole = ann.KMeansBucketizer(clusters=5, iterations=3, samples=300)
    for a, b in zip(everything.buckets(points, points), whole.buckets(points, points), strict=True):
        assert torch.equal(a, b)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many samples as clusters"):
        ann.KMeansBucketizer(clusters=8, samples=7)
