"""Speed and memory of a rollout: frames per second four ways, chunk latencies, peak memory.

Four rates, because each paper quotes another one: denoise passes only; with the commit pass; with decoding; and wall
time end to end. Each over the whole run and over its steady state, the chunks after a warm-up.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

PARTS = ("denoise", "commit", "decode")


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one chunk: of each measured part, and wall time end to end."""

    frames: int
    parts: dict[str, float]
    wall: float

    def rows(self) -> dict[str, float]:
        """Metrics of this chunk for the store."""
        parts = {f"{part}_s": seconds for part, seconds in self.parts.items()}
        return {**parts, "chunk_s": self.wall, "fps_chunk": self.frames / self.wall}


@dataclass(frozen=True)
class Rates:
    """Video frames per second of some chunks; `decode` is None where nothing was decoded."""

    denoise: float
    commit: float
    decode: float | None
    end_to_end: float
    latency_p50: float
    latency_p99: float

    def rows(self, suffix: str = "") -> dict[str, float]:
        """Metrics of the whole run for the store; `suffix` such as "/steady" is appended to the names."""
        named = {
            "fps_denoise": self.denoise,
            "fps_commit": self.commit,
            "fps_decode": self.decode,
            "fps": self.end_to_end,
            "latency_p50": self.latency_p50,
            "latency_p99": self.latency_p99,
        }
        return {name + suffix: value for name, value in named.items() if value is not None}


@dataclass
class PassTimer:
    """Times chunks and their parts.

        with timer.chunk(frames=4):
            with timer.measure("denoise"): ...
            with timer.measure("commit"): ...

    On a GPU the parts are timed by events on the current stream and the device is waited for once at each end of a
    chunk, never between passes: the parts are device time, the wall time holds everything. Parts measured outside of a
    chunk (a prefill) do not count.

    Args:
        device: where the work happens.
        warmup: chunks that steady-state rates leave out.
    """

    device: torch.device | str = "cpu"
    warmup: int = 1
    chunks: list[ChunkTimes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self._on_gpu = self.device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._in_chunk = False

    @contextmanager
    def chunk(self, *, frames: int) -> Iterator[None]:
        """Around everything that makes one chunk of `frames` video frames. A chunk that raises is not counted."""
        if self._in_chunk:
            raise RuntimeError("PassTimer.chunk was entered inside another chunk")
        self._seconds, self._events, self._in_chunk = {}, [], True
        try:
            self._wait()
            start = time.perf_counter()
            yield
            self._wait()
            wall = time.perf_counter() - start
        finally:
            self._in_chunk = False
        for name, first, last in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        self.chunks.append(ChunkTimes(frames, dict(self._seconds), wall))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Around one part of a chunk: denoise, commit or decode. Several of one name add up."""
        if not self._in_chunk:
            yield
        elif self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(torch.cuda.current_stream(self.device))
            yield
            last.record(torch.cuda.current_stream(self.device))
            self._events.append((name, first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def whole_run(self) -> Rates:
        """Rates over all chunks."""
        return rates(self.chunks)

    def steady_state(self) -> Rates:
        """Rates over the chunks after the warm-up.

        Raises:
            ValueError: there are none.
        """
        return rates(self.chunks[self.warmup :])

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def rates(chunks: list[ChunkTimes]) -> Rates:
    """Frames per second and latency percentiles of `chunks`.

    Raises:
        ValueError: there are none.
    """
    if not chunks:
        raise ValueError("no chunk was timed after the warm-up: time more chunks or lower the warm-up")
    frames = sum(chunk.frames for chunk in chunks)
    denoise, commit, decode = (sum(chunk.parts.get(part, 0.0) for chunk in chunks) for part in PARTS)
    decoded = any("decode" in chunk.parts for chunk in chunks)
    walls = [chunk.wall for chunk in chunks]

    def per_second(seconds: float) -> float:
        return frames / seconds if seconds > 0 else float("nan")

    return Rates(
        denoise=per_second(denoise),
        commit=per_second(denoise + commit),
        decode=per_second(denoise + commit + decode) if decoded else None,
        end_to_end=per_second(sum(walls)),
        latency_p50=float(np.percentile(walls, 50)),
        latency_p99=float(np.percentile(walls, 99)),
    )


class PeakMemory:
    """Peak memory since `start`.

    On a GPU: what the allocator had allocated and reserved. On the CPU: the process's resident set, with everything in
    it; where the system cannot reset that peak, it is since the start of the process and `since_start` is False.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.since_start = True
        self._earlier: dict[str, float] = {}

    def start(self) -> None:
        """Begin a new peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._earlier = {}
        self._reset()

    def rows(self) -> dict[str, float]:
        """Metrics for the store, in bytes, since `start`: peak_allocated, and on a GPU peak_reserved."""
        return {name: max(value, self._earlier.get(name, 0.0)) for name, value in self._peaks().items()}

    def chunk_rows(self) -> dict[str, float]:
        """peak_chunk, in bytes: the peak since the last call, or since `start`; nothing if peaks cannot be reset."""
        peaks, self._earlier = self._peaks(), self.rows()
        self._reset()
        return {"peak_chunk": peaks["peak_allocated"]} if self.since_start else {}

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
        except OSError:
            self.since_start = False

    def _peaks(self) -> dict[str, float]:
        if self.device.type == "cuda":
            return {
                "peak_allocated": float(torch.cuda.max_memory_allocated(self.device)),
                "peak_reserved": float(torch.cuda.max_memory_reserved(self.device)),
            }
        return {"peak_allocated": float(peak_resident_bytes())}


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
