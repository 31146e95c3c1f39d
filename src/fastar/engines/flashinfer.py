"""FlashInfer's FlashAttention-3 for Hopper, single prefill: dense, and log-counted through a head of 192 coordinates.

Batch entries and heads are the heads of one request. Tensors go in as they lie, with any strides that are multiples of
16 bytes. The first call of each pair of widths compiles with nvcc, 75 to 90 s; the package keeps the result on disk.

Block plans are not executed: the package's wrapper for blocks of any size copies the lists to the host, waits for
them, wants equal widths of keys and values, and so takes no log-counts.
"""

from __future__ import annotations

import math
import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastar.engines.registry import AttentionCall, Engine
from fastar.engines.unbiased import augmented, live_queries, silence, unfit_for_hopper_kernels, widths

_KEY_MULTIPLE = 64
# of keys and values: what its Hopper kernel is written for
_WIDTHS = {(64, 64), (128, 128), (256, 256), (192, 128)}
_ALIGNED = 8  # numbers in 16 bytes


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    from flashinfer import single_prefill_with_kv_cache

    live, lead = live_queries(call), call.q.shape[:2]
    call = augmented(call, FLASHINFER)
    # tokens first: with heads first, the package would take the number of heads for that of the keys
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (call.q, call.k, call.v))
    options = {"sm_scale": call.scale, "backend": "fa3", "return_lse": call.return_lse}
    out, lse = single_prefill_with_kv_cache(q, k, v, **options), None
    if call.return_lse:
        out, base_two = out
        lse = (base_two.transpose(0, 1) * math.log(2)).unflatten(0, lead)
    return silence(out.transpose(0, 1).unflatten(0, lead), lse, live)


def _limits(call: AttentionCall) -> str | None:
    both = widths(call, FLASHINFER)
    if both not in _WIDTHS:
        pairs = ", ".join(f"{k}/{v}" for k, v in sorted(_WIDTHS))
        return f"its kernel has widths of keys and values {pairs}, not {both[0]}/{both[1]}"
    for x in (call.q, call.k, call.v):
        if x.stride(-1) != 1 or any(stride % _ALIGNED for stride in x.stride()[:-1]):
            return (
                f"it reads vectors that are contiguous and start at multiples of 16 bytes, not {x.stride()}"
            )
    return None


@cache
def _missing(device: torch.device) -> str | None:
    if find_spec("flashinfer") is None:
        return "it needs FlashInfer: pip install flashinfer-python"
    if find_spec("flashinfer_jit_cache") is None and not _has_nvcc():
        return "FlashInfer compiles its kernel on first use, without nvcc: install the CUDA toolkit or set CUDA_HOME"
    return unfit_for_hopper_kernels(device)


def _has_nvcc() -> bool:
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or (Path(given) / "bin" / "nvcc").exists()


FLASHINFER = Engine(
    name="flashinfer",
    run=_run,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    lse_devices=frozenset({"cuda"}),
    takes_plan=False,
    key_multiple=_KEY_MULTIPLE,
    counts_in_keys=frozenset({"cuda"}),
    missing=_missing,
    limits=_limits,
)
