"""A run is named by what changes its result, and by nothing else."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from fastar.results import identity as identity_module
from fastar.results import recorded_config, run_id

BASE: dict[str, Any] = {
    "backbone": {"name": "doom", "checkpoint": "${paths.checkpoints}/doom"},
    "cache": {"budget_frames": 24, "threshold": 0.9, "key": "last"},
    "paths": {"outputs": "outputs", "checkpoints": "checkpoints"},
    "launcher": {"workers": 2},
    "logger": {"mode": "offline"},
    "seed": 0,
    "output": "${paths.outputs}/demo",
}


def name(changes: dict[str, Any] | None = None, **options: Any) -> str:
    config = OmegaConf.merge(OmegaConf.create(BASE), OmegaConf.create(changes or {}))
    return run_id(config, **{"seed": 0, "checkpoint_sha256": "abc", **options})  # type: ignore[arg-type]


def test_the_same_run_has_the_same_short_name() -> None:
    assert name() == name() and len(name()) == 12
    reordered = dict(reversed(list(BASE.items())))
    assert run_id(OmegaConf.create(reordered), seed=0, checkpoint_sha256="abc") == name()


def test_the_name_is_pinned() -> None:
    """Renamed runs are runs computed again: change this value only together with SCHEMA_VERSION."""
    assert run_id({"cache": {"budget": 1.0}}, seed=3, checkpoint_sha256="abc") == "b3583fd6e6e3"


@pytest.mark.parametrize(
    "changes",
    [
        {"paths": {"outputs": "/elsewhere", "checkpoints": "/models"}},
        {"launcher": {"workers": 16, "partition": "gpu"}},
        {"logger": {"mode": "online"}},
        {"hydra": {"job": {"num": 3}}},
        {"seed": 5},
        {"cache": {"budget_frames": 24.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_and_how_it_runs_does_not_count(changes: dict[str, Any]) -> None:
    assert name(changes) == name()


def test_what_changes_the_result_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        name({"cache": {"threshold": 0.8}}),
        name({"cache": {"key": "mean"}}),
        name({"backbone": {"name": "other"}}),
        name(seed=1),
        name(seed=[0, 1]),
        name(checkpoint_sha256="abd"),
        name(timing_device="NVIDIA H100"),
    ]
    monkeypatch.setattr(identity_module, "SCHEMA_VERSION", identity_module.SCHEMA_VERSION + 1)
    others.append(name())
    monkeypatch.undo()
    assert len({name(), *others}) == len(others) + 1


def test_recorded_config_keeps_no_directories() -> None:
    config = OmegaConf.create({**BASE, "paths": {"outputs": "/data/outputs", "checkpoints": "/data/models"}})
    recorded = recorded_config(config)
    assert recorded["backbone"]["checkpoint"] == "<paths.checkpoints>/doom"
    assert recorded["output"] == "<paths.outputs>/demo"
    assert "/data" not in str(recorded) and not {"paths", "launcher", "logger"} & recorded.keys()
    assert recorded["cache"] == BASE["cache"]


def test_left_out_groups_are_never_resolved() -> None:
    """Hydra's own resolvers work only inside Hydra."""
    config = OmegaConf.create({"cache": {"a": 1}, "paths": {"outputs": "${hydra:runtime.output_dir}"}})
    assert recorded_config(config) == {"cache": {"a": 1}}


def test_an_object_in_the_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache\.size is a set"):
        run_id({"cache": {"size": {1, 2}}}, seed=0)
