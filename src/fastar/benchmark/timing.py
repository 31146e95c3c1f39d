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
    """Seconds a call: median and quartiles of the repeats, and whether these were replays of a CUDA graph."""

    median: float
    low: float
    high: float
    captured: bool


@torch.inference_mode()
def timed(
    call: Callable[[], object],
    *,
    device: torch.device,
    repeats: int = 7,
    warmup: int = 2,
    flush: bool = True,
    captured: bool | None = False,
) -> Timing:
    """Time `call`, `repeats` times after `warmup` untimed ones.

    On a GPU each repeat lies between two events on the current stream, and the host waits once, at the end; with
    `flush`, a buffer larger than the L2 cache is written before each. `captured` times a CUDA graph of the call, as
    captured rollouts run it: without what the host takes to launch its kernels. None: on a GPU, and where it can be.

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
    if captured or (captured is None and device.type == "cuda"):
        graph = _graph_of(call, device, needed=captured is True)
        captured = graph is not None
        call = graph.replay if graph is not None else call
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
    return Timing(float(median), float(low), float(high), bool(captured))


def _graph_of(
    call: Callable[[], object], device: torch.device, *, needed: bool
) -> torch.cuda.CUDAGraph | None:
    """A graph of the call; None if there can be none and none is `needed`."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # what fails leaves the stream of the capture behind
        if needed:
            raise
        return None
    return graph


def _clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product of `size`: the ceiling of everything made of products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device=device, repeats=repeats, captured=None).median
