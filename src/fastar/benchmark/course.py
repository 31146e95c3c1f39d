"""One method's way through the recording: it fills its cache, then makes chunks in its steady state, all timed."""

from __future__ import annotations

import gc
from typing import Any

import torch

from fastar.benchmark.workload import Variant, Workload
from fastar.metrics.efficiency import ChunkTimes, PassTimer, PeakMemory


class Course:
    """A rollout whose chunks are denoised from noise and committed as the recording shows them.

    The device is waited for between chunks, never within one by this class. Memory is what the method takes beside the
    weights: what else is allocated when it starts is subtracted.

    Args:
        workload: see there.
        variant: the method.
        capture: whether its passes shall be captured; None: as the workload says.
        options: further arguments of `start_rollout`.

    Attributes:
        rollout: what runs.
        captured: whether its passes are.
        watched: whether peaks of memory are this course's; to be unset while another's memory comes and goes.
        chunks: times of all chunks so far.
        curve: a row for each of them.
    """

    def __init__(
        self, workload: Workload, variant: Variant, *, capture: bool | None = None, **options: Any
    ) -> None:
        self.workload, self.variant = workload, variant
        self._others = taken(workload.device)
        self._weights = sum(
            p.numel() * p.element_size() for p in workload.session.backbone.transformer.parameters()
        )
        self.memory = PeakMemory(workload.device)
        self.memory.start()
        self.timer = PassTimer(workload.device, warmup=0)
        wanted = workload.capture if capture is None else capture
        self.rollout, self.captured = workload.start(variant, capture=wanted, timer=self.timer, **options)
        self.curve: list[dict[str, Any]] = []
        self.watched = True
        self._known = self.peaks()

    @property
    def chunks(self) -> list[ChunkTimes]:
        return self.timer.chunks

    def advance(self) -> ChunkTimes:
        """Make the next chunk."""
        workload, rollout = self.workload, self.rollout
        truth, actions = workload.truth(rollout), workload.actions(rollout)
        with self.timer.chunk(frames=workload.video_frames):
            rollout.denoise(actions)
            rollout.commit(truth, actions)
        times, cache = self.chunks[-1], rollout.state.cache
        self._known = self.peaks()
        peak = self.memory.chunk_rows()  # ends this chunk's peak, watched or not
        self.curve.append(
            {
                "method": self.variant.name,
                "budget": self.variant.budget,
                "latent_frame": rollout.next_frame,
                **times.rows(),
                "cache_bytes": cache.bytes_used(),
                "cache_slots": cache.slots_used(),
                **({f"{name}_so_far": value for name, value in self._known.items()} if self.watched else {}),
                **(peak if self.watched else {}),
            }
        )
        return times

    def run(self, chunks: int) -> list[ChunkTimes]:
        """The next `chunks` chunks."""
        return [self.advance() for _ in range(chunks)]

    def fill(self, most_frames: int) -> dict[str, float]:
        """Advance until the cache grows no more, or to latent frame `most_frames`; how long that took.

        Returns:
            fill_s: seconds of wall time, captures and compilation included; fill_frames: latent frames that were
            made when the cache was full; full: 1, or 0 if it still grew.
        """
        cache, full = self.rollout.state.cache, False
        while not full and self.rollout.next_frame < most_frames:
            before = cache.bytes_used()
            self.advance()
            full = cache.bytes_used() == before  # the chunk after the one that filled it
        made = self.chunks[:-1] if full and len(self.chunks) > 1 else self.chunks
        frames = len(made) * self.workload.session.chunk
        return {"fill_s": sum(c.wall for c in made), "fill_frames": frames, "full": float(full)}

    def peaks(self) -> dict[str, float]:
        """peak_allocated, and on a GPU peak_reserved: bytes that the method took at most, the weights counted.

        As they were when it was last watched.
        """
        if not self.watched:
            return self._known
        rows = self.memory.rows()
        if self.workload.device.type != "cuda":
            return rows  # of the process: nothing tells whose they are
        allocated, reserved = self._others
        others = {"peak_allocated": allocated - self._weights, "peak_reserved": reserved - self._weights}
        return {name: value - others[name] for name, value in rows.items()}

    def close(self) -> None:
        """Give the memory back."""
        del self.rollout
        taken(self.workload.device)


def taken(device: torch.device) -> tuple[int, int]:
    """Bytes (allocated, reserved) on a GPU once what nobody holds is given back; (0, 0) elsewhere."""
    gc.collect()
    if device.type != "cuda":
        return (0, 0)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
