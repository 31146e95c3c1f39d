"""The engine benchmark: what its rows count, and that its errors would show a wrong engine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from fastar import engines
from fastar.benchmark.attention_calls import Geometry, cases
from fastar.benchmark.command import run
from fastar.benchmark.engines import benchmark
from fastar.benchmark.timing import timed

SMALL = Geometry(batch=1, heads=2, head_dim=16, queries=64, block_q=16, block_k=32)
CPU = torch.device("cpu")


def rows(names: list[str], keys: int = 256, kept: bool = True) -> list[dict]:
    return list(
        benchmark(names, [keys], [0.25], SMALL, device=CPU, dtype=torch.float32, repeats=3, kept=kept)
    )


@pytest.mark.parametrize("kept", [False, True])
def test_rows_count_what_was_executed(kept: bool) -> None:
    found = rows(["reference", "sdpa"], kept=kept)
    assert [row["kind"] for row in found[::2]] == ["dense", "biased", "sparse", "sparse biased"]
    for row in found:
        assert row["reason"] is None and row["error"] < 1e-5
        assert row["density"] == (0.25 if "sparse" in row["kind"] else 1.0)
        work = 4 * 2 * 64 * 256 * 16 * row["density"]
        assert row["tflops"] == pytest.approx(work / (row["ms"] / 1e3) / 1e12)
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
    dense = {row["engine"]: row["tflops"] for row in found if row["kind"] == "dense"}
    for row in found:
        assert row["of_dense"] == pytest.approx(row["tflops"] / dense[row["engine"]])
        assert row["of_best"] == pytest.approx(row["tflops"] / max(dense.values()))


def test_a_last_block_that_is_short_and_more_queries_than_are_checked() -> None:
    assert max(row["error"] for row in rows(["sdpa"], keys=250)) < 1e-5


@pytest.mark.parametrize("ignored", ["log_count", "plan"])
def test_an_engine_that_ignores_an_argument_shows(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(call: engines.AttentionCall) -> tuple[torch.Tensor, None]:
        options = {"log_count": call.log_count, "plan": call.plan, ignored: None}
        return engines.attend(call.q, call.k, call.v, engine="reference", **options)[0], None

    original = engines.get
    wrong = engines.Engine(name="wrong", run=careless)
    monkeypatch.setattr("fastar.engines.get", lambda name: wrong if name == "wrong" else original(name))
    monkeypatch.setattr("fastar.engines.resolve", lambda name, *_: name)
    touched = "biased" if ignored == "log_count" else "sparse"
    for row in rows(["wrong"], kept=False):
        assert (row["error"] > 0.05) == (touched in row["kind"]), row["kind"]


def test_an_engine_that_errs_in_its_last_queries_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(call: engines.AttentionCall) -> tuple[torch.Tensor, None]:
        out = engines.attend(
            call.q, call.k, call.v, log_count=call.log_count, plan=call.plan, engine="reference"
        )[0]
        last = slice(-1, None) if call.plan is None else call.plan.query_index[0, 0, -1:]
        out[:, 0, last] *= 2
        return out, None

    original, wrong = engines.get, engines.Engine(name="wrong", run=careless)
    monkeypatch.setattr("fastar.engines.get", lambda name: wrong if name == "wrong" else original(name))
    monkeypatch.setattr("fastar.engines.resolve", lambda name, *_: name)
    assert min(row["error"] for row in rows(["wrong"], kept=False)) > 0.05


def test_an_engine_that_takes_the_scale_of_the_wider_head_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-counts inside the keys: they come with the scale of the true head dim."""

    def careless(call: engines.AttentionCall) -> tuple[torch.Tensor, None]:
        return engines.attend(call.q, call.k, call.v, plan=call.plan, engine="reference")[0], None

    original, wrong = engines.get, engines.Engine(name="wrong", run=careless)
    monkeypatch.setattr("fastar.engines.get", lambda name: wrong if name == "wrong" else original(name))
    monkeypatch.setattr("fastar.engines.resolve", lambda name, *_: name)
    for row in rows(["wrong"]):
        assert (row["error"] > 0.03) == ("biased" in row["kind"]), row["kind"]


def test_slots_that_are_read_packed() -> None:
    options = {"device": CPU, "dtype": torch.float32, "repeats": 1, "packed_bits": [8, 4]}
    found = list(benchmark([], [80], [], SMALL, **options))
    assert [row["engine"] for row in found] == ["packed int8", "packed int4"]
    for row in found:
        assert row["kind"] == "biased" and row["reason"] is None and row["error"] < 1e-5


def test_what_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: engines.AttentionCall) -> tuple[torch.Tensor, None]:
        raise RuntimeError("out of memory\nand so on")

    original, broken = engines.get, engines.Engine(name="broken", run=fails, takes_plan=False)
    monkeypatch.setattr("fastar.engines.get", lambda name: broken if name == "broken" else original(name))
    monkeypatch.setattr("fastar.engines.resolve", lambda name, *_: name)
    reasons = [row["reason"] for row in rows(["broken"])]
    assert reasons == ["out of memory"] * 2 + ["it takes no block plan"] * 2
    assert all(row["ms"] is None and row["of_dense"] is None for row in rows(["broken"]))


def test_a_timing_needs_a_repeat() -> None:
    with pytest.raises(ValueError, match="at least one repeat"):
        timed(lambda: None, device=CPU, repeats=0)
    assert len(cases([0.5, 0.1])) == 6


def test_what_is_captured_on_a_cpu() -> None:
    assert not timed(lambda: None, device=CPU, captured=None).captured
    with pytest.raises(ValueError, match="on a CUDA device only, not on cpu"):
        timed(lambda: None, device=CPU, captured=True)


@pytest.mark.gpu
def test_what_waits_for_the_host_is_timed_as_it_is() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    x, stream = torch.ones(64, device=device), torch.cuda.current_stream()
    assert timed(lambda: x * 2, device=device, captured=None).captured
    found = timed(lambda: float(x.sum()), device=device, captured=None)
    assert found.median > 0 and not found.captured
    assert torch.cuda.current_stream() == stream and float(x.sum()) == 64
    with pytest.raises(RuntimeError):
        timed(lambda: float(x.sum()), device=device, captured=True)
    assert torch.cuda.current_stream() == stream
    assert timed(lambda: x * 2, device=device, captured=True).captured


def test_the_command_writes_what_it_prints(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["queries=32", "head_dim=16", "block_q=16", "block_k=16"]
    overrides = [
        "keys_per_call=[64]", "densities=[0.5]", "dtype=float32", "matmul_size=64", "repeats=2", "engines=[sdpa]",
        "packed_bits=[4]", "device=cpu", f"output={tmp_path}", *(f"geometry.{setting}" for setting in small),
    ]  # fmt: skip
    result = run(composed("benchmark", *overrides))
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == json.loads(json.dumps({"card": result["card"], "rows": result["rows"]}))
    assert json.loads((tmp_path / "engines.json").read_text())["rows"] == last["rows"]
    assert last["card"]["matmul_tflops"] > 0 and {row["engine"] for row in last["rows"]} == {
        "sdpa",
        "packed int4",
    }
    with pytest.raises(ValueError, match="unknown attention engine 'fast': choose one of auto"):
        run(composed("benchmark", *overrides, "engines=[fast]"))
    with pytest.raises(ValueError, match="unknown dtype 'float8': choose one of"):
        run(composed("benchmark", *overrides, "dtype=float8"))


def test_rows_stay_when_a_later_one_ends_the_command(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*args: object, **options: object) -> Iterator[dict]:
        yield {"engine": "sdpa", "tflops": 2.0}
        raise KeyboardInterrupt

    monkeypatch.setattr("fastar.benchmark.engines.benchmark", ends)
    with pytest.raises(KeyboardInterrupt):
        run(composed("benchmark", "matmul_size=64", "device=cpu", "dtype=float32", f"output={tmp_path}"))
    (row,) = json.loads((tmp_path / "engines.json").read_text())["rows"]
    assert row["engine"] == "sdpa" and row["ceiling_share"] > 0
