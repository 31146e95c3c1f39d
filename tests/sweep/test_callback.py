"""Hydra's hooks around a sweep: what they raise is not lost."""

import pytest
from omegaconf import OmegaConf

from fastar.compare import sweep_report
from fastar.sweep import callback


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'codec'"), ValueError("no runs")])
def test_an_error_at_the_end_of_a_sweep_is_its_exit_status(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would turn it into a warning, and the command would end with status 0."""
    monkeypatch.setattr(sweep_report, "finish_sweep", lambda config, jobs: fail(error))
    monkeypatch.setattr(callback, "expand", lambda config: [])
    with pytest.raises(SystemExit) as stopped:
        callback.SweepCallback().on_multirun_end(OmegaConf.create({"baseline": "dense"}))
    told = f"{stopped.value} {capsys.readouterr().err}"
    assert stopped.value.code not in (0, None) and str(error) in told
