"""What tests of whole stages share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Trainings that are to repeat bit for bit stay off GPUs, where kernels may add up in another order each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield
