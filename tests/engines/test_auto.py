"""What `auto` becomes: by device, by what is installed, and by the calls to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastar import engines
from fastar.engines import auto

HOPPER = torch.device("cuda")
Installs = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Installs:
    """`machine(9, "fa4")`: a GPU of that capability with these engines installed; tensors stay on the CPU."""

    def having(major: int, *installed: str) -> None:
        original = engines.get

        def get(name: str) -> engines.Engine:
            reason = None if name in installed else f"no {name} here"
            return dataclasses.replace(original(name), missing=lambda device: reason)

        monkeypatch.setattr(auto, "get", get)
        monkeypatch.setattr(auto, "capability", lambda device: (major, 0))

    return having


def calls(**options: object) -> engines.AttentionCall:
    given = {"dtype": torch.bfloat16, "head_dim": 128, "device": torch.device("cpu")} | options
    return engines.example_call(**given)  # type: ignore[arg-type]


def test_by_device() -> None:
    assert engines.resolve("auto", "cpu") == "sdpa"
    assert engines.resolve("auto", "meta") == "reference"
    assert engines.EngineChoice(name="flex").resolve("cpu") == "flex"
    assert engines.resolve("auto", "cpu", calls(blocks=(16, 32), tags=True)) == "sdpa"
    with pytest.raises(
        ValueError, match=r"finds none for these calls \(sdpa: it does not take torch.float64\)"
    ):
        engines.resolve("auto", "cpu", calls(dtype=torch.float64))


def test_the_fastest_that_is_installed(machine: Installs) -> None:
    machine(9, "fa4", "flashinfer", "cudnn", "sdpa")
    assert engines.choose(HOPPER, None) == ("fa4", {})
    machine(9, "cudnn", "sdpa")
    assert engines.choose(HOPPER, calls()) == (
        "cudnn", {"fa4": "no fa4 here", "flashinfer": "no flashinfer here"},
    )  # fmt: skip
    machine(8, "fa4", "sdpa")
    assert engines.choose(HOPPER, calls()) == ("sdpa", {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blocks": (128, 128)}, "fa4"),
        ({"blocks": (16, 32)}, "sdpa"),
        ({"blocks": (128, 128), "tags": True}, "sdpa"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"head_dim": 64}, "fa4"),
    ],
)
def test_an_engine_that_would_refuse_the_calls_is_passed_over(
    machine: Installs, options: dict[str, object], expected: str
) -> None:
    machine(9, "fa4", "flashinfer", "cudnn", "sdpa")
    chosen, passed = engines.choose(HOPPER, calls(**options))
    assert chosen == expected
    assert list(passed) == list(auto.ORDER["cuda 9"])[: len(passed)] and all(passed.values())


def test_every_engine_of_the_order_exists() -> None:
    assert {name for order in auto.ORDER.values() for name in order} <= set(engines.names())


def test_calls_over_few_keys_have_an_engine_of_their_own_where_one_was_measured(machine: Installs) -> None:
    machine(9, "fa4", "cudnn")
    assert auto.for_few_keys(HOPPER, calls()) == "cudnn"
    assert auto.for_few_keys(HOPPER, calls(dtype=torch.float32)) is None, "which it does not take"
    machine(8, "cudnn")
    assert auto.for_few_keys(HOPPER, calls()) is None, "not measured there"
    machine(9, "fa4")
    assert auto.for_few_keys(HOPPER, calls()) is None, "not there"
