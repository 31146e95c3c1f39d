"""What the tests of Triton's kernels share."""

import os

import pytest


@pytest.fixture
def only_where_triton_runs(request: pytest.FixtureRequest) -> None:
    """For tests of kernels: skips those on a CPU without the interpreter."""
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")
