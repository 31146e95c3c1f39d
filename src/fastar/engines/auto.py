"""What `auto` means: the first engine, in the order of measured speed, that fits the machine and the calls to come.

Measured on one H100 80GB HBM3 (torch 2.11.0+cu130, FlashAttention-4 4.0.0b36, FlashInfer 0.6.13, cuDNN of that torch),
bfloat16, 12 heads of 128, 4,680 queries, TFLOP/s at 32,760 and 131,040 keys, medians of 7, as CUDA graphs (FlashInfer
is not), 2026-11-27:

    engine       dense       log-counted   block-sparse, density 0.25
    fa4          751  768    692  707      616  662
    flashinfer   637  597    569  513      -
    cudnn        550  543    457  450      -
    sdpa         317  313

One engine serves all calls of a rollout but those over few keys, a prompt's, so that methods of one comparison differ
in nothing else. FlashAttention-4 comes first: the fastest of all, its last wave of tiles being split over the keys
(`fastar.engines.waves`), and the only one of the first three that executes block plans. `experiments/benchmark.py`
measures the table anew. At 512 keys without log-counts it is slow: 0.090 ms in a CUDA graph, where cuDNN takes 0.038
and SDPA 0.064 (same machine, 2026-11-26, `experiments/benchmark.py 'keys_per_call=[512]' 'densities=[]'`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastar.engines.plan import BlockPlan
from fastar.engines.registry import AttentionCall, capability, get

ORDER = {
    "cuda 9": ("fa4", "flashinfer", "cudnn", "sdpa"),
    "cuda": ("sdpa",),  # other capabilities: not measured
    "cpu": ("sdpa",),
}
"""Engines by device type and major compute capability; on other devices `reference`, which needs nothing."""


FEW_KEYS = 1024
FOR_FEW_KEYS = {"cuda 9": "cudnn"}
"""The engine for calls over at most `FEW_KEYS` keys without log-counts, where it is another one."""


def for_few_keys(device: torch.device, call: AttentionCall) -> str | None:
    """The engine that `auto` takes for calls like `call` over few keys, if it is not the one for all others."""
    found = capability(device)
    name = None if found is None else FOR_FEW_KEYS.get(f"{device.type} {found[0]}")
    plain = replace(call, log_count=None, plan=None)
    if name is None or get(name).unfit_for_device(device) or get(name).unfit_for(plain):
        return None
    return name


COPY_SHARE = 0.25
"""Of a GPU's memory, what a copy of quantised slots may take: as long as it does, `auto` makes one.

Attention over packed slots ran at 221 and 208 TFLOP/s where the first engine above has 697 and 707 on a copy (int8,
same machine, 32,760 and 131,040 keys, 2026-11-27, `experiments/benchmark.py`): what it saves is memory, not time.
"""


def reads_packed(device: torch.device, copy_bytes: int | None) -> tuple[bool, str]:
    """Whether `auto` reads quantised slots packed, and why. Their copies take `copy_bytes`; None: more and more."""
    if device.type != "cuda":
        return False, "packed slots are read on a GPU"
    if copy_bytes is None:
        return True, "their copy would grow without bound"
    memory = torch.cuda.get_device_properties(device).total_memory
    size = f"their copy takes {copy_bytes / 2**30:.2f} GiB of the GPU's {memory / 2**30:.2f}"
    return copy_bytes > COPY_SHARE * memory, f"{size}, where up to {COPY_SHARE:.0%} are spent on speed"


def order(device: torch.device) -> tuple[str, ...]:
    """The engines that `auto` may become on a device, first choice first."""
    found = capability(device)
    named = None if found is None else ORDER.get(f"{device.type} {found[0]}")
    return named or ORDER.get(device.type, ("reference",))


def choose(device: torch.device, call: AttentionCall | None) -> tuple[str | None, dict[str, str]]:
    """The engine for a device and calls like `call`, or None; and why those before it were passed over."""
    passed: dict[str, str] = {}
    for name in order(device):
        engine = get(name)
        reason = engine.unfit_for_device(device)
        if reason is None and call is not None:
            reason = engine.unfit_for(call)
        if reason is None:
            return name, passed
        passed[name] = reason
    return None, passed


def example_call(
    *,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    blocks: tuple[int, int] | None = None,
    tags: bool = False,
) -> AttentionCall:
    """A call of one token that stands for those of a rollout, to ask engines whether they would execute them.

    Args:
        blocks: (block_q, block_k) of the block plans to come; None: there are none.
        tags: whether these have tags inside the blocks.
    """
    token = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    plan = None
    if blocks is not None:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        tag = torch.zeros(1, 1, 1, dtype=torch.long, device=device) if tags else None
        plan = BlockPlan(None, None, *blocks, mask, query_tags=tag, key_tags=tag, lengths=(1, 1))
    return AttentionCall(token, token, token, token[..., 0].float(), plan, return_lse=False)
