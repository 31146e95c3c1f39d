"""The fused commit of `TempCache` against the plain one, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar import cache
from fastar.cache.policy import SlotPolicy

from .worlds import FLOAT, LAYERS, bound, random_chunk

pytest.importorskip("triton")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "last": {"key": "last"},
    "one_round": {"rounds": 1, "weighting": "ward"},
    "regions": {"sink_frames": 1, "recent_frames": 1, "weighting": "older"},
    "all_recent": {"recent_share": 0.0, "refresh": 0.0},
    "no_value": {"value_weight": 0.0, "weighting": "none", "rounds": 3},
}


@pytest.fixture(autouse=True)
def _device_that_triton_takes(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")


def committed(policy: SlotPolicy, chunks: int, device: torch.device, layers: int = LAYERS) -> SlotPolicy:
    bound(policy, device=device, layers=layers, chunk_frames=2)
    for number in range(chunks):
        for layer in range(layers):
            policy.stage(layer, random_chunk(1000 * layer + number, 2 * number, device=device))
        policy.commit(2 * number, 2)
    return policy


def fields(policy: SlotPolicy, layer: int) -> dict[str, Tensor]:
    return dict(policy._buffers[layer].narrow(0, policy.filled).fields) | policy._extras[layer]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_fused_commits_are_the_plain_ones(name: str, device: torch.device) -> None:
    """Random float32 features have no near ties: the same slots merge, and numbers agree to rounding."""
    options = {"budget_frames": 14, **FLOAT, **VARIANTS[name]}
    plain = committed(cache.TempCache(**options), 9, device)
    fused = committed(cache.TempCache(commit_by="fused", **options), 9, device)
    assert plain.filled == fused.filled == plain.capacity_slots()
    for layer in range(LAYERS):
        expected, found = fields(plain, layer), fields(fused, layer)
        for field in ("position", "count", "partner"):
            assert torch.equal(expected[field], found[field]), field
        for field in ("key", "value", "moment", "observed"):
            torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-4)
    assert (fields(fused, 0)["count"] > 1).any()
