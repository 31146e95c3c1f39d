"""On a GPU, too, a stage that signals interrupt ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastar.training.run import METRICS
from tests.training.test_resume import fitted
from tests.training.test_run import same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on loaders
]


@pytest.mark.parametrize("name", ["autoencoder", "transformer"])
def test_an_interrupted_stage_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    whole, expected = fitted(tmp_path / "whole", name, [])
    assert next(iter(whole.weights[0].values())).is_cuda
    _, repeated = fitted(tmp_path / "again", name, [])
    assert same(repeated, expected), "two uninterrupted ones"
    last, found = fitted(tmp_path / "interrupted", name, [{2: "SIGTERM"}, {20: "SIGUSR1"}, {52: "SIGTERM"}])
    assert same(found, expected), "EMA weights"
    assert same(last.weights[-1], whole.weights[-1]), "weights before the last step"
    metrics = (tmp_path / "whole" / name / METRICS).read_text()
    assert (tmp_path / "interrupted" / name / METRICS).read_text() == metrics
