"""The products of a Wan pass alone, the pass around them without its attention, and what 8-bit products cost.

A pass can hardly take less than its products at the rate found here and its attention (`attention_flops`) at the
engine's. What passes without attention add to the products is elementwise work and, uncaptured, launches. Weights are
random, which no time depends on.

    python -m fastar.benchmark.linears conf/backbone/wan_1_3b.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from fastar.attention.context import Stream
from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.fused import Execution
from fastar.backbones.wan.launch import quantise
from fastar.backbones.wan.linears import Fp8Linear, Linear, Linears
from fastar.backbones.wan.transformer import CausalWanTransformer
from fastar.benchmark.elementwise import kernels_of, timed_kernels
from fastar.benchmark.timing import timed
from fastar.compare.command import wide_console
from fastar.engines.augmented import augmented_width
from fastar.results.tables import to_rich


@dataclass(frozen=True)
class Product:
    """[rows, inputs] times [inputs, outputs], `count` times a pass, in as many layers; `big`: in 8 bits if any are."""

    name: str
    rows: int
    inputs: int
    outputs: int
    count: int = 1
    big: bool = False

    @property
    def flops(self) -> int:
        """Of all."""
        return 2 * self.rows * self.inputs * self.outputs * self.count


def products(config: WanConfig, *, batch: int, frames: int, tokens_per_frame: int) -> list[Product]:
    """Every product of one fused pass, in order within a block; a prompt's keys and values are made once, not here."""
    rows, dim, layers = batch * frames * tokens_per_frame, config.dim, config.num_layers
    patch = config.patch**2
    block = [("q, k and v", dim, 3 * dim), ("o", dim, dim)]
    if config.text_dim is not None or config.image_dim is not None:
        block += [("cross q", dim, dim), ("cross o", dim, dim)]
    block += [("feed-forward up", dim, config.ffn_dim), ("feed-forward down", config.ffn_dim, dim)]
    return [
        Product("patches", rows, patch * config.in_channels, dim),
        Product("time", batch * frames, config.freq_dim, dim),
        Product("time, second", batch * frames, dim, dim),
        Product("modulation", batch * frames, dim, 6 * dim),
        *(Product(name, rows, inputs, outputs, layers, True) for name, inputs, outputs in block),
        Product("head", rows, dim, patch * config.out_channels),
    ]


def attention_flops(config: WanConfig, *, queries: int, keys: int, prompt: int = 0) -> int:
    """Of a pass's dense attention in all layers: `queries` to `keys`, the own ones counted, and to `prompt` tokens."""
    return 4 * config.num_layers * config.dim * queries * (keys + prompt)


def benchmark(
    config: WanConfig,
    *,
    frames: int,
    grid: tuple[int, int],
    executions: Sequence[Execution],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 7,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows what, ms, ms_captured (in a CUDA graph; None on a CPU), tflops, of_products: products first, then passes.

    Passes are of one chunk of `frames` latent frames of `grid` tokens, with attention that costs nothing, in each of
    `executions`; products also in each of their `linears`. tflops and of_products, a time over that of the products in
    the model's dtype, are of the captured times where there are any.

    Raises:
        ValueError: the device cannot run one of them.
    """
    torch.manual_seed(seed)
    listed = products(config, batch=1, frames=frames, tokens_per_frame=grid[0] * grid[1])
    flops = sum(product.flops for product in listed)
    kinds = dict.fromkeys([Linears.MODEL, *(Linears(execution.linears) for execution in executions)])
    calls = [(f"products, {kind}", _product_calls(listed, kind, device, dtype)) for kind in kinds]
    first: float | None = None
    for what, call in chain(calls, _pass_calls(config, executions, frames, grid, device, dtype)):
        ms, captured = _times(call, device, repeats)
        best = ms if captured is None else captured
        first = first or best
        yield {
            "what": what,
            "ms": ms,
            "ms_captured": captured,
            "tflops": flops / best / 1e9,
            "of_products": best / first,
        }


def velocity_error(
    transformer: CausalWanTransformer, forward: Callable[[], Tensor], linears: Linears = Linears.FP8
) -> float:
    """Relative error |v' - v| / |v| that a transformer's velocity has for being fused with `linears`, not the model's.

    `forward` makes one pass of the transformer, from the same state each time. It is left as it was, but for weights
    packed.
    """
    held, found = transformer.fused, []
    try:
        for kind in (Linears.MODEL, linears):
            Execution(fused=True, linears=kind).apply(transformer)
            with torch.inference_mode():
                found.append(forward().double())
    finally:
        transformer.fused = held
    return float((found[1] - found[0]).norm() / found[0].norm())


def _product_calls(
    listed: Sequence[Product], kind: Linears, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """All products one after the other, every layer with weights of its own, as in a pass: none is in the L2 cache."""
    calls: list[tuple[Linear, Any]] = []
    for product in listed:
        eight_bits = product.big and kind == Linears.FP8
        x: Any = torch.randn(product.rows, product.inputs, device=device).to(dtype)
        if eight_bits:
            x = quantise(x)
        for _ in range(product.count):
            weight = torch.randn(product.outputs, product.inputs, device=device).to(dtype)
            bias = torch.randn(product.outputs, device=device).to(dtype)
            calls.append(((Fp8Linear if eight_bits else Linear)(weight / product.inputs**0.5, bias), x))

    def run() -> None:
        for linear, rows in calls:
            linear(rows)

    return run


def _pass_calls(
    config: WanConfig,
    executions: Sequence[Execution],
    frames: int,
    grid: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[], object]]]:
    with torch.device(device):
        transformer = CausalWanTransformer(config).to(dtype)
        size = (config.patch * grid[0], config.patch * grid[1])
        latents = torch.randn(1, frames, config.out_channels, *size).to(dtype)
        timesteps = torch.full((1, frames), 500.0)
        given: dict[str, Any] = {}
        with torch.inference_mode():
            if config.text_dim is not None:
                text = torch.randn(1, config.text_len or 512, config.text_dim).to(dtype)
                given["text"] = transformer.project_text(text)

    def forward() -> Tensor:
        return transformer(latents, timesteps, attend=_for_nothing, **given)

    for execution in executions:
        execution.apply(transformer)
        yield f"pass without attention, {execution}", forward


def _for_nothing(stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of attention: the own value, or the query."""
    return v if stream == "self" else q


def _times(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Milliseconds as it is, and captured."""
    ms = 1e3 * timed(call, device=device, repeats=repeats).median
    if device.type != "cuda":
        return ms, None
    return ms, 1e3 * timed(call, device=device, repeats=repeats, captured=True).median


def main() -> None:
    """The tables for people, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", help="a file of conf/backbone, of the Wan family")
    parser.add_argument("--numerics", default="self_forcing")
    parser.add_argument("--fp8", action="store_true", help="8-bit linears, too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    backbone, device = OmegaConf.load(given.backbone), torch.device(given.device)
    config = replace(instantiate(backbone.transformer), numerics=given.numerics)
    token = 8 * config.patch  # pixels: Wan's autoencoder makes one latent of 8 x 8
    height, width = (pixels // token for pixels in backbone.frame_size)
    executions = [Execution(), Execution(fused=True)]
    if given.fp8:
        executions.append(Execution(fused=True, linears=Linears.FP8))
    sizes: dict[str, Any] = {
        "frames": backbone.chunk_frames,
        "grid": (height, width),
        "dtype": torch.bfloat16,
    }
    timing: dict[str, Any] = {"device": device, "repeats": given.repeats}
    rows = list(benchmark(config, executions=executions, **sizes, **timing))
    sizes |= {"key_width": augmented_width(config.head_dim, 16), "linears": executions[-1].linears}
    kernels = list(timed_kernels(kernels_of(config, **sizes, device=device), **timing))
    card = {"config": given.backbone, "device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        card["device"] = torch.cuda.get_device_name(device)
    console = wide_console()
    for table in (rows, kernels):
        console.print(
            to_rich(pd.DataFrame(table).round(4).astype(str), title=f"{card}: median of the repeats")
        )
    result = {"card": card, "rows": rows, "kernels": kernels}
    console.print(json.dumps(result), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
