"""What a pass costs at least on this machine: its linears and its attention at the rates that they reach alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from fastar import engines
from fastar.benchmark.page import Page
from fastar.benchmark.timing import matmul_flops, timed
from fastar.benchmark.workload import Workload, redundancy_of
from fastar.engines.auto import example_call
from fastar.rollout.rollout import Rollout
from fastar.sparsity.blocks import DensityOf, aimed_density

COPIED = 2**30  # bytes of the copy that is timed on a GPU; a CPU's takes a 64th of it


@dataclass(frozen=True)
class Ceiling:
    """Rates measured alone, before any rollout.

    Attributes:
        matmul_tflops: of a large square product.
        copy_tb_s: terabytes read and written a second by a copy.
        linears_ms: of all linears of a pass, those of the prompt left out, which are computed once a rollout.
        linears_tflops: their rate.
        attention_tflops: of the engine without log-counts or plan, one chunk's queries on `attention_keys` keys.
        attention_keys: the stock window, the current chunk included.
        engine: which one.
    """

    matmul_tflops: float
    copy_tb_s: float
    linears_ms: float
    linears_tflops: float
    attention_tflops: float
    attention_keys: int
    engine: str

    def pass_ms(self, workload: Workload, rollout: Rollout) -> float:
        """The least that a denoising pass of `rollout` takes, by these rates and the pairs that its method computes."""
        sizes, tokens = workload.session.backbone.config.transformer, workload.chunk_tokens
        selector = rollout.state.self_selector
        contexts = list(workload.session.loop.denoise_passes(rollout.next_frame))
        keys = rollout.state.cache.slots_used() + tokens
        density = getattr(selector, "density", None) or 1.0
        of: DensityOf = getattr(selector, "density_of", "all")
        shares = [
            1.0 if selector.is_dense(layer, context) else aimed_density(density, of, tokens, keys)
            for context in contexts
            for layer in range(sizes.num_layers)
        ]
        pairs = tokens * keys * sum(shares) / len(shares)
        if sizes.text_dim is not None and workload.contents.prompts is not None:
            pairs += tokens * (sizes.text_len or workload.contents.prompts.embeddings.shape[1])
        flops = 4 * pairs * sizes.dim * sizes.num_layers
        return self.linears_ms + 1e3 * flops / (self.attention_tflops * 1e12)


def measure_ceiling(workload: Workload, config: DictConfig, page: Page) -> Ceiling:
    """Time the parts alone."""
    sizes, device, repeats = workload.session.backbone.config.transformer, workload.device, config.repeats
    tokens, dtype = workload.chunk_tokens, page.dtype
    block = workload.session.backbone.transformer.blocks[0]
    weights = [
        module.weight
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in ("cross_attn.k", "cross_attn.v")
    ]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=device).to(w.dtype) for w in weights}
    # As graphs: a host that launches slower than these run would raise the floor that rollouts are held against.
    alone: dict[str, Any] = {"device": device, "repeats": repeats, "captured": None}
    linears = timed(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], **alone)
    flops = sum(2 * tokens * w.numel() for w in weights)

    call = example_call(dtype=dtype, head_dim=sizes.head_dim, device=device)
    engine = engines.resolve(config.engine.name, device, call)
    window = int(config.rollout.window.attended_frames) * workload.session.backbone.config.tokens_per_frame
    shape = (1, sizes.num_heads, window, sizes.head_dim)
    k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    q = torch.randn(1, sizes.num_heads, tokens, sizes.head_dim, device=device).to(dtype)
    attention = timed(lambda: engines.attend(q, k, v, engine=engine), **alone)
    return Ceiling(
        matmul_tflops=matmul_flops(device, dtype, size=config.matmul_size, repeats=repeats) / 1e12,
        copy_tb_s=_copy_bytes(device, repeats) / 1e12,
        linears_ms=1e3 * linears.median * sizes.num_layers,
        linears_tflops=flops / linears.median / 1e12,
        attention_tflops=4 * tokens * window * sizes.dim / attention.median / 1e12,
        attention_keys=window,
        engine=engine,
    )


def show_card(workload: Workload, config: DictConfig, page: Page) -> Ceiling:
    """Measure the ceiling and print the card of a mode with rollouts."""
    ceiling, motion = measure_ceiling(workload, config, page), redundancy_of(workload.motion)
    backbone = workload.session.backbone.config
    stated: dict[str, Any] = {
        "ceiling": asdict(ceiling),
        "backbone": backbone.name,
        "layers": workload.layers,
        "weights": workload.weights,
        "captured": workload.capture,
        "execution": str(workload.execution),
        "chunk_tokens": workload.chunk_tokens,
        "contents": workload.contents.about,
        "history_frames": config.history_frames,
        "motion": {"latent_frames": len(workload.motion.latents), "sha256": workload.motion.sha256} | motion,
    }
    c, shown = ceiling, workload.motion.latents
    page.card(
        stated,
        f"{backbone.name} of {workload.layers} layers, {stated['weights']} weights, chunks of {backbone.chunk_frames} "
        f"latent frames = {workload.chunk_tokens} tokens, passes {workload.execution}, "
        f"{'' if workload.capture else 'not '}captured. "
        f"Alone: products of {config.matmul_size} x {config.matmul_size} matrices {c.matmul_tflops:.3g} TFLOP/s, "
        f"linears of a pass {c.linears_ms:.3g} ms ({c.linears_tflops:.3g} TFLOP/s), attention by {c.engine} on "
        f"{c.attention_keys:,} keys {c.attention_tflops:.3g} TFLOP/s, copies {c.copy_tb_s:.3g} TB/s. Contents: "
        f"{len(shown):,} latent frames of {workload.contents.about}; {motion['distinct_frames']:.1%} of their frames "
        f"are distinct, {motion['near_earlier']:.0%} of the tokens nearly equal one of the six latent frames before "
        f"(noise: {motion['near_earlier_noise']:.0%}).",
    )
    return ceiling


def _copy_bytes(device: torch.device, repeats: int) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    size = COPIED if device.type == "cuda" else COPIED // 64
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device=device, repeats=repeats).median
