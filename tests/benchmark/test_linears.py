"""The products of a Wan pass are counted and timed, and the cost of 8 bits is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastar.attention.context import Attend, Stream
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.fused import Execution, fuse
from fastar.backbones.wan.linears import Linears, multiplies_fp8
from fastar.benchmark.elementwise import kernels_of, timed_kernels
from fastar.benchmark.linears import attention_flops, benchmark, products, velocity_error

pytest.importorskip("triton")

TINY = WanConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    ffn_dim=48,
    freq_dim=16,
    text_dim=16,
    text_len=8,
    numerics="self_forcing",
)
GRID, FRAMES = (2, 3), 3


def no_attention(stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + 1


def given(config: WanConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a pass takes beside attention."""
    inputs = {
        "latents": torch.randn(1, FRAMES, 16, 4, 6, dtype=dtype),
        "timesteps": 1000 * torch.rand(1, FRAMES),
    }
    if config.text_dim is not None:
        inputs["text"] = torch.randn(1, 8, config.text_dim, dtype=dtype)
    return inputs


def counted_flops(model: CausalWanTransformer, inputs: dict[str, Any], attend: Attend) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**inputs, attend=attend)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [TINY, replace(TINY, text_dim=None, text_len=None)])
def test_products_are_those_of_a_pass(config: WanConfig) -> None:
    model = CausalWanTransformer(config)
    inputs = given(config)
    if "text" in inputs:
        with torch.inference_mode():
            inputs["text"] = model.project_text(inputs["text"])
    listed = products(config, batch=1, frames=FRAMES, tokens_per_frame=GRID[0] * GRID[1])
    assert sum(product.flops for product in listed) == counted_flops(model, inputs, no_attention)


def test_attention_counts_both_its_products() -> None:
    def attend(stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v

    model, inputs, tokens = CausalWanTransformer(TINY), given(TINY), FRAMES * GRID[0] * GRID[1]
    found = counted_flops(model, inputs, attend) - counted_flops(model, inputs, no_attention)
    assert found == attention_flops(TINY, queries=tokens, keys=tokens, prompt=8)


def test_products_and_passes_are_timed() -> None:
    rows = list(
        benchmark(
            TINY, frames=1, grid=GRID, executions=[Execution(), Execution(fused=True)],
            device=torch.device("cpu"), dtype=torch.float32, repeats=1,
        )
    )  # fmt: skip
    assert [row["what"] for row in rows] == [
        "products, model", "pass without attention, eager", "pass without attention, fused, linears=model",
    ]  # fmt: skip
    assert rows[0]["of_products"] == 1 and all(row["ms"] > 0 and row["ms_captured"] is None for row in rows)
    flops = sum(p.flops for p in products(TINY, batch=1, frames=1, tokens_per_frame=GRID[0] * GRID[1]))
    assert rows[2]["tflops"] * rows[2]["ms"] * 1e9 == pytest.approx(flops)


def test_kernels_are_timed(device: torch.device) -> None:
    linears = Linears.FP8 if device.type == "cpu" or multiplies_fp8(device) else Linears.MODEL
    sizes = {"frames": 1, "grid": GRID, "key_width": 32, "linears": linears, "dtype": torch.bfloat16}
    kernels = kernels_of(TINY, **sizes, device=device)  # type: ignore[arg-type]
    rows = list(timed_kernels(kernels, device=device, repeats=1))
    assert len(rows) == 6 + 2 * (linears == Linears.FP8)
    assert all(row["ms_pass"] == row["calls"] * row["ms"] > 0 for row in rows)
    calls = {row["what"]: row["calls"] for row in rows}
    assert calls["residual and norm"] == 6 and calls["place, 32 wide"] == 2


@pytest.mark.gpu
def test_captured_products_and_passes_are_timed() -> None:
    config = replace(TINY, dim=1536, num_heads=12, ffn_dim=8960)
    executions = [Execution(), Execution(fused=True)]
    if multiplies_fp8(torch.device("cuda")):
        executions.append(Execution(fused=True, linears="fp8"))  # type: ignore[arg-type]
    rows = list(
        benchmark(
            config, frames=3, grid=(6, 10), executions=executions,
            device=torch.device("cuda"), dtype=torch.bfloat16, repeats=2,
        )
    )  # fmt: skip
    assert len(rows) == 2 * len(executions) - 1
    assert all(row["ms_captured"] > 0 for row in rows)


def test_velocity_error_is_that_of_8_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model's is some hundredths; the transformer is left eager, and its weights as they were."""
    if device.type == "cpu":  # which multiplies 8 bits, too, slowly
        monkeypatch.setattr("fastar.backbones.wan.fused.check_fp8", lambda transformer: None)
    elif not multiplies_fp8(device):
        pytest.skip("no 8-bit products on this GPU")
    model = CausalWanTransformer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(device, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in given(TINY, torch.bfloat16).items()}

    def forward() -> Tensor:
        return model(**inputs, attend=no_attention)

    with torch.inference_mode():
        before = forward()
    assert 0.003 < velocity_error(model, forward) < 0.15
    assert velocity_error(model, forward, Execution().linears) == 0
    assert model.fused is None
    with torch.inference_mode():
        assert torch.equal(forward(), before)


def test_execution_is_what_a_config_says() -> None:
    model = CausalWanTransformer(TINY)
    Execution(fused=True, linears="model").apply(model)  # type: ignore[arg-type]
    assert model.fused is not None
    Execution().apply(model)
    assert model.fused is None
    with pytest.raises(ValueError, match="needs fused=true"):
        Execution(linears="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8"):
        fuse(model, "nonsense")
