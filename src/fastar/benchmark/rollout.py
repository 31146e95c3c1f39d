"""The mode `rollout`: frames a second, latencies and memory of methods at their budgets, against one baseline.

The baseline's rollout stays in memory and makes a few chunks before, between and after those of every method, so that a
machine that slows down slows both. Ratios are of rates of denoising and commits; decoding is timed by itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from omegaconf import DictConfig

from fastar.benchmark.ceiling import Ceiling, show_card
from fastar.benchmark.course import Course
from fastar.benchmark.decode import decode_rows
from fastar.benchmark.dense import dense_rows, needed_frames
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.workload import Variant, Workload, open_workload, variants_of
from fastar.metrics.efficiency import ChunkTimes, rates

CURVE = "rollout_chunks"
FAILURES = (RuntimeError, ValueError)  # out of memory, a budget that is too small, an engine that cannot


def run_rollout(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `rollout`.

    Raises:
        ValueError: the baseline is not among the methods, or the recording is too short.
    """
    needed = max(_latent_frames(config), needed_frames(config) if config.dense.beside else 0)
    workload = open_workload(config, page, latent_frames=needed)
    baseline = workload.variant(config.baseline)
    ceiling = show_card(workload, config, page)
    dense = dense_rows(workload, ceiling, config, page) if config.dense.beside else []
    decoded = decode_rows(config, workload, page)
    table = _Table(workload, ceiling, baseline, config)
    for variant in workload.variants:
        if variant is not baseline:
            row = table.add(variant)
            page.say(f"{variant.label}: " + (row["reason"] or f"{row['fps_commit']:.4g} frames/s"))
            page.keep([*table.finished(decoded, dense), *dense, *decoded], {CURVE: table.curve})
    rows = table.finished(decoded, dense)
    lines = [_text(row) for row in rows]
    base = rows[0]
    page.say(
        f"The machine: {len(table.blocks)} blocks of {base['method']} between the methods' ran at "
        f"{base['ratio_low']:.3f} to {base['ratio_high']:.3f} of their median rate."
    )
    page.show(lines, f"video frames a second in the steady state, {workload.weights} weights")
    if decoded:
        page.show(
            [{name: _number(value) for name, value in row.items()} for row in decoded], "decoding alone"
        )
    return [*rows, *dense, *decoded], {CURVE: table.curve}


def _latent_frames(config: DictConfig) -> int:
    """Of the recording: what the baseline comes through, which makes chunks beside every method."""
    steady, methods = config.steady, len(variants_of(config)) - 1
    blocks = 1 + steady.repeats * max(1, methods)
    return int(
        steady.fill_frames + config.backbone.chunk_frames * (1 + steady.warmup + steady.chunks * blocks)
    )


class _Table:
    """Rows of methods, each measured beside the baseline."""

    def __init__(self, workload: Workload, ceiling: Ceiling, baseline: Variant, config: DictConfig) -> None:
        self.workload, self.ceiling, self.config = workload, ceiling, config
        self.base = Course(workload, baseline)
        self.base_filled = self._ready(self.base)
        self.blocks = [self._block(self.base)]  # of the baseline, in order
        self.base.watched = False
        self.rows: Rows = []
        self._curve: Rows = []

    @property
    def curve(self) -> Rows:
        """Every chunk so far."""
        return self.base.curve + self._curve

    def add(self, variant: Variant) -> dict[str, Any]:
        """Measure `variant`; its row, which is kept."""
        empty = _named(variant) | {"reason": None}
        course, steady = None, []
        try:
            course = Course(self.workload, variant)
            filled = self._ready(course)
            first = len(self.blocks) - 1
            for _ in range(self.config.steady.repeats):
                steady.append(self._block(course))
                self.blocks.append(self._block(self.base))
            row = empty | self._numbers(course, steady, filled) | self._ratios(steady, self.blocks[first:])
        except FAILURES as error:
            row = empty | {"reason": str(error).split("\n")[0]}
        if course is not None:
            self._curve += course.curve
            course.close()
        self.rows.append(row)
        return row

    def finished(self, decoded: Rows, dense: Rows) -> Rows:
        """All rows, the baseline's first, with the rate that the first decoder leaves, and the ratio to dense."""
        steady = [block for block in self.blocks if block]
        speeds = [_speed(block) for block in steady]
        base = _named(self.base.variant) | {"reason": None}
        base |= self._numbers(self.base, steady, self.base_filled)
        base |= {"ratio": 1.0, "ratio_low": min(speeds) / float(np.median(speeds))}
        base["ratio_high"] = max(speeds) / float(np.median(speeds))
        rows = [base, *self.rows]
        for row in [row for row in rows if row["reason"] is None]:
            if decoded:
                row["fps_decode"] = 1 / (1 / row["fps_commit"] + 1 / decoded[0]["fps"])
                row["decoder"] = decoded[0]["decoder"]
            if dense and dense[-1]["reason"] is None:
                row["over_dense"] = row["fps_commit"] / dense[-1]["fps"]
        return rows

    def _ready(self, course: Course) -> dict[str, float]:
        """Fill, then the chunks in which everything is compiled or captured for a full cache."""
        filled = course.fill(self.config.steady.fill_frames)
        course.run(self.config.steady.warmup)
        return filled

    def _block(self, course: Course) -> list[ChunkTimes]:
        return course.run(self.config.steady.chunks)

    def _numbers(
        self, course: Course, steady: list[list[ChunkTimes]], filled: dict[str, float]
    ) -> dict[str, Any]:
        workload, chunks = self.workload, [times for block in steady for times in block]
        steps, cache = len(workload.session.loop.timesteps), course.rollout.state.cache
        pass_ms = 1e3 * float(np.median([times.parts["denoise"] for times in chunks])) / steps
        floor = self.ceiling.pass_ms(workload, course.rollout)
        speed = rates(chunks)
        return {
            **speed.rows(),
            "pass_ms": pass_ms,
            "commit_ms": 1e3 * float(np.median([times.parts["commit"] for times in chunks])),
            "pass_floor_ms": floor,
            "over_floor": pass_ms / floor,
            "chunks": len(chunks),
            "chunk_frames": workload.video_frames,
            **filled,
            **course.peaks(),
            "cache_bytes": cache.bytes_used(),
            "working_bytes": course.rollout.state.working_bytes(),
            "cache_slots": cache.slots_used(),
            "layers": workload.layers,
            "engine": course.rollout.state.engine,
            **course.rollout.state.reading.record,
            # while a cache grows every pass meets another layout, and runs as it is
            "captured": course.captured and bool(filled["full"]),
            "execution": str(workload.execution),
            "weights": workload.weights,
        }

    def _ratios(self, steady: list[list[ChunkTimes]], around: list[list[ChunkTimes]]) -> dict[str, Any]:
        """Of each block to the mean of the baseline's before and after it: median, least, greatest."""
        beside = [(_speed(a) + _speed(b)) / 2 for a, b in pairwise(around)]
        ratios = [_speed(block) / base for block, base in zip(steady, beside, strict=True)]
        speeds = [_speed(block) for block in around]
        return {
            "baseline": self.base.variant.name,
            "ratio": float(np.median(ratios)),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "baseline_fps": float(np.median(speeds)),
            "baseline_spread": (max(speeds) - min(speeds)) / float(np.median(speeds)),
        }


def _speed(block: list[ChunkTimes]) -> float:
    """Frames a second of denoising and commits."""
    return rates(block).commit


def _named(variant: Variant) -> dict[str, Any]:
    named = {"method": variant.name, "budget": variant.budget}
    return named if variant.share is None else named | {"budget_share": variant.share}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(row: dict[str, Any]) -> dict[str, str]:
    named = {"method": row["method"], "budget": "–" if row["budget"] is None else f"{row['budget']:g}"}
    if row["reason"] is not None:
        return named | {"denoise": "–", "note": row["reason"]}
    return named | {
        "denoise": f"{row['fps_denoise']:.4g}",
        "+ commit": f"{row['fps_commit']:.4g}",
        "+ decode": f"{row['fps_decode']:.4g}" if "fps_decode" in row else "–",
        "end to end": f"{row['fps']:.4g}",
        "over baseline": f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        "over dense": f"{row['over_dense']:.2f}" if "over_dense" in row else "–",
        "chunk ms p50 / p99": f"{1e3 * row['latency_p50']:.4g} / {1e3 * row['latency_p99']:.4g}",
        "pass ms (floor)": f"{row['pass_ms']:.4g} ({row['pass_floor_ms']:.4g}, {row['over_floor']:.2f}x)",
        "fill s": f"{row['fill_s']:.3g}{'' if row['full'] else ' (not full)'}",
        "peak GiB": " / ".join(
            f"{row[n] / 2**30:.4g}" for n in ("peak_allocated", "peak_reserved") if n in row
        ),
        "cache + copies GiB": f"{row['cache_bytes'] / 2**30:.3f} + {row['working_bytes'] / 2**30:.3f}",
    }
