"""Medians of repeated calls, by events on a GPU and by the clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2 cache: repeats must not find their inputs there


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles of the repeats."""

    median: float
    low: float
    high: float


@torch.inference_mode()
def timed(
    call: Callable[[], object],
    *,
    device: torch.device,
    repeats: int = 7,
    warmup: int = 2,
    flush: bool = True,
    captured: bool = False,
) -> Timing:
    """Time `call`, `repeats` times after `warmup` untimed ones.

    On a GPU each repeat lies between two events on the current stream, and the host waits once, at the end; with
    `flush`, a buffer larger than the L2 cache is written before each. `captured` times a CUDA graph of the call, as
    captured rollouts run it: without what the host takes to launch its kernels.

    Raises:
        ValueError: fewer than one repeat, or a graph on another device than a GPU.
        RuntimeError: the call cannot be captured.
    """
    if repeats < 1:
        raise ValueError(f"a timing needs at least one repeat, got {repeats}")
    if captured and device.type != "cuda":
        raise ValueError(f"calls can be captured on a CUDA device only, not on {device.type}")
    for _ in range(warmup):
        call()
    if captured:
        call = _graph_of(call)
    if device.type != "cuda":
        seconds = [_clocked(call) for _ in range(repeats)]
    else:
        cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in events:
            if cold is not None:
                cold.zero_()
            first.record()
            call()
            last.record()
        torch.cuda.synchronize(device)
        seconds = [first.elapsed_time(last) / 1000 for first, last in events]
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(median), float(low), float(high))


def _graph_of(call: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product of `size`: the ceiling of everything made of products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device=device, repeats=repeats).median
