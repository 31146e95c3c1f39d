"""What a profile of one chunk says: time by kind of kernel, gaps between them, and whether the host was waited for."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

KINDS = (
    ("attention", r"flash|fmha|attention|attn|attend|sdpa|flex|^join_parts$"),
    (
        "match and merge",
        r"^(nearest\w*|halved_squares|merge_partials|moments|cholesky|features|cheaper_partner|lowest|project|places|find_roots|fold)$",
    ),
    ("plan", r"^(codes|shared_pairs|block_means|choose_blocks)$"),
    ("sort", r"sort|radix|topk|scan|bitonic|searchsorted|unique|segment"),
    ("gemm", r"gemm|cutlass|nvjet|cublas|xmma|splitk|wgmma|\bmm\b|addmm|bmm|matmul|linear|conv"),
    ("copy", r"memcpy|memset|copy|^move_rows$|catarray|\bcat\b|gather|scatter|index|fill|zero"),
    ("elementwise", r"elementwise|triton|vectorized|reduce|norm|softmax|rope|^place$|quantise|gelu|aten::"),
)
"""Kinds of kernels by words in their names; the first that is found counts, `other` if none is."""
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
CHUNK = "fastar chunk"
_CALLS = ("cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Trace:
    """A chunk as it was executed.

    Attributes:
        kernels: (name, microseconds) of each piece of work, on the GPU, or of each operation on a CPU.
        span_us: from the beginning of the first to the end of the last.
        gap_us: of that, time in which nothing was executed.
        waits: calls by which the host waited for the device within the chunk, by name.
        to_host, to_device: copies between host and device within it.
    """

    kernels: tuple[tuple[str, float], ...]
    span_us: float
    gap_us: float
    waits: Mapping[str, int]
    to_host: int
    to_device: int

    def by_kind(self) -> dict[str, tuple[float, int]]:
        """Kind of kernel -> (milliseconds, number), those that occur, in the order of `KINDS`."""
        found = dict.fromkeys((*(kind for kind, _ in KINDS), "other"), (0.0, 0))
        for name, us in self.kernels:
            ms, count = found[kind_of(name)]
            found[kind_of(name)] = (ms + us / 1000, count + 1)
        return {kind: sums for kind, sums in found.items() if sums[1]}

    def by_name(self) -> list[dict[str, Any]]:
        """Rows kernel, kind, ms, calls, the longest first."""
        sums: dict[str, list[float]] = {}
        for name, us in self.kernels:
            sums.setdefault(name, []).append(us)
        rows = [
            {"kernel": name[:200], "kind": kind_of(name), "ms": sum(us) / 1000, "calls": len(us)}
            for name, us in sums.items()
        ]
        return sorted(rows, key=lambda row: -float(str(row["ms"])))


def kind_of(name: str) -> str:
    """The kind of a kernel or operation."""
    return next((kind for kind, words in KINDS if re.search(words, name.lower())), "other")


def traced(make_chunk: Callable[[], object], device: torch.device) -> Trace:
    """Profile one call of `make_chunk`. What it left running is waited for afterwards and not counted as a wait."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        with record_function(CHUNK):
            make_chunk()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def read_trace(events: Sequence[Mapping[str, Any]]) -> Trace:
    """The part of a Chrome trace that lies in the annotation `CHUNK`.

    Raises:
        ValueError: there is no such annotation, or nothing was executed in it.
    """
    marks = [e for e in events if e.get("cat") == "user_annotation" and e.get("name") == CHUNK]
    if not marks:
        raise ValueError(f"the trace has no annotation '{CHUNK}'")
    start, stop = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]
    work = [e for e in events if e.get("cat") in _WORK and e["ts"] >= start]
    if work:
        kernels = [(str(e["name"]), float(e["dur"])) for e in work]
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in work]
    else:
        ops = [e for e in events if e.get("cat") == "cpu_op" and start <= e["ts"] <= stop]
        kernels, spans = list(_own_times(ops)), [(e["ts"], e["ts"] + e["dur"]) for e in ops]
    if not spans:
        raise ValueError("nothing was executed in the chunk that was profiled")
    span = max(last for _, last in spans) - min(first for first, _ in spans)
    told = [e for e in events if e.get("cat") in _CALLS]
    calls = [str(e["name"]) for e in told if start <= e["ts"] <= stop]
    copies = [str(e["name"]) for e in work if e["cat"] == "gpu_memcpy"]
    return Trace(
        kernels=tuple(kernels),
        span_us=span,
        gap_us=span - _covered(spans),
        waits={name: calls.count(name) for name in WAITS if name in calls},
        to_host=sum("DtoH" in name for name in copies),
        to_device=sum("HtoD" in name for name in copies),
    )


def _own_times(ops: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """(name, time without that of operations within it) of nested operations, thread by thread."""
    for thread in {op["tid"] for op in ops}:
        open_ops: list[list[Any]] = []  # name, end, own time
        for op in sorted((op for op in ops if op["tid"] == thread), key=lambda op: (op["ts"], -op["dur"])):
            while open_ops and open_ops[-1][1] <= op["ts"]:
                name, _, own = open_ops.pop()
                yield name, own
            if open_ops:
                open_ops[-1][2] -= op["dur"]
            open_ops.append([str(op["name"]), op["ts"] + op["dur"], op["dur"]])
        yield from ((name, own) for name, _, own in open_ops)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, stop)."""
    covered, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered
