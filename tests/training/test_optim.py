"""Who is optimised by what, and how the learning rate follows the share of the run that is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastar.training import optim
from fastar.training.optim import Progress, build_optimizers, set_learning_rate
from tests.training.small import autoencoder_model, fresh_backbone, world_model


def names_by_group(module: nn.Module, kind: str) -> dict[tuple[str, float], list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: dict[tuple[str, float], list[str]] = {}
    for optimizer in build_optimizers(module, learning_rate=0.1, weight_decay=0.02, kind=kind):
        for group in optimizer.param_groups:
            members = groups.setdefault((type(optimizer).__name__, group["weight_decay"]), [])
            members += [names[id(parameter)] for parameter in group["params"]]
    return groups


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest_each_once() -> None:
    module = world_model(fresh_backbone())
    groups = names_by_group(module, "muon")
    assert set(groups) == {("Muon", 0.02), ("AdamW", 0.02), ("AdamW", 0.0)}
    attention = [f"self_attn.{part}.weight" for part in "qkvo"]
    assert sorted(groups["Muon", 0.02]) == sorted(
        f"transformer.blocks.{layer}.{name}"
        for layer in range(2)
        for name in [*attention, "ffn.0.weight", "ffn.2.weight"]
    )
    everyone = [name for members in groups.values() for name in members]
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(everyone) == sorted(trained) and not [
        name for name in trained if name.startswith("autoencoder")
    ]
    assert {"transformer.head.head.weight", "transformer.action_embedding.weight"} < set(
        groups["AdamW", 0.02]
    )
    assert all(module.get_parameter(name).ndim < 2 for name in groups["AdamW", 0.0])
    assert "transformer.blocks.0.self_attn.q.bias" in groups["AdamW", 0.0]


def test_adamw_alone() -> None:
    module = autoencoder_model(fresh_backbone())
    for kind in ("adamw", "muon"):  # an autoencoder has no block matrices
        groups = names_by_group(module, kind)
        assert {optimizer for optimizer, _ in groups} == {"AdamW"}
        assert sum(len(members) for members in groups.values()) == len(list(module.parameters()))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': choose muon or adamw"):
        build_optimizers(nn.Linear(2, 2), learning_rate=0.1, weight_decay=0.0, kind="sgd")


def rates(optimizers: list[torch.optim.Optimizer]) -> list[set[float]]:
    return [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]


def test_the_learning_rate_of_muon_is_a_multiple_of_that_of_adamw() -> None:
    options = {"learning_rate": 0.1, "weight_decay": 0.02}
    optimizers = build_optimizers(world_model(fresh_backbone()), matrix_scale=3.0, **options)
    assert rates(optimizers) == [{0.1}, {0.1 * 3.0}]
    set_learning_rate(optimizers, 0.25)
    assert rates(optimizers) == [{0.25}, {0.75}]
    set_learning_rate(optimizers := build_optimizers(world_model(fresh_backbone()), **options), 0.25)
    assert rates(optimizers) == [{0.25}, {0.25}]
    with pytest.raises(ValueError, match="matrix_scale must be positive, got 0"):
        build_optimizers(nn.Linear(2, 2), matrix_scale=0, **options)


def progress(**options: Any) -> Progress:
    given = {"max_steps": 100, "max_minutes": None, "warmup_steps": 10, "decay_share": 0.4}
    return Progress(**given | options)


def test_by_steps_the_rate_warms_up_holds_and_falls_to_zero() -> None:
    run = progress()
    scales = [run.scale(step, run.done(step)) for step in range(101)]
    assert scales[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert scales[10:61] == [1.0] * 51
    assert scales[60:] == pytest.approx([1 - n / 40 for n in range(41)])
    assert run.done(1000) == 1.0
    assert progress(warmup_steps=0).scale(0, 0.0) == 1.0


def test_by_minutes_whichever_limit_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5000.0
    monkeypatch.setattr(optim.time, "monotonic", lambda: now)
    run = progress(max_minutes=10.0)
    assert run.elapsed == 0.0 and run.done(0) == 0.0, "the clock starts with the first batch"
    now += 600
    run.start()
    now += 150
    assert run.done(1) == pytest.approx(0.25) and run.done(30) == pytest.approx(0.3)
    now += 300
    assert run.done(30) == pytest.approx(0.75) and run.scale(30, run.done(30)) == pytest.approx(0.25 / 0.4)
    now += 1000
    assert run.done(30) == 1.0 and run.scale(30, 1.0) == 0.0


def test_time_of_an_interrupted_part_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(optim.time, "monotonic", lambda: now)
    run = progress(max_minutes=10.0)
    run.elapsed_before = 240.0
    run.start()
    now += 60
    assert run.elapsed == 300.0 and run.done(0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options", [{"max_steps": 0}, {"max_minutes": 0.0}, {"decay_share": 0.0}, {"decay_share": 1.5}]
)
def test_limits_that_make_no_schedule_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"max_steps >= 1, max_minutes > 0 .* decay_share in"):
        progress(**options)


def test_the_rate_reaches_every_optimizer_of_a_step() -> None:
    weights = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    module = nn.Module()
    module.blocks = nn.ParameterList(weights)
    optimizers = build_optimizers(module, learning_rate=1.0, weight_decay=0.0)
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "Muon"]
    set_learning_rate(optimizers, 0.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    assert all((weight == 1).all() for weight in weights)
