"""The mode `endurance`: one rollout of many minutes, whose last frames should be as fast and as small as its first.

Contents never come twice: the recording must be as long as the rollout, walks through one fresh world after the other.
A backbone with fewer layers than the published one fits more frames into the time; rows say how many it has.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from fastar.benchmark.ceiling import show_card
from fastar.benchmark.course import Course
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.workload import Variant, Workload, open_workload
from fastar.metrics.efficiency import rates

CURVE = "endurance_chunks"


def run_endurance(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `endurance`: a row for every method, and a curve of all their chunks.

    Raises:
        ValueError: the recording is shorter than the rollout, or the rollout than what is compared.
    """
    chunk = config.backbone.chunk_frames
    chunks = config.endurance.video_frames // (config.video_stride * chunk)
    workload = open_workload(config, page, latent_frames=chunks * chunk)
    show_card(workload, config, page)
    rows: Rows = []
    curve: Rows = []
    for variant in workload.variants:
        row, course = _endured(workload, variant, chunks, config, page)
        rows.append(row)
        curve += course.curve
        course.close()
    page.show([_text(row) for row in rows], "endurance: the last frames against the first after filling")
    return rows, {CURVE: curve}


def _endured(
    workload: Workload, variant: Variant, chunks: int, config: DictConfig, page: Page
) -> tuple[dict[str, Any], Course]:
    course = Course(workload, variant)
    filled = course.fill(config.steady.fill_frames)
    course.run(config.steady.warmup)
    begun = len(course.chunks)
    compared = -(-config.endurance.compared_frames // workload.video_frames)
    if chunks < begun + 2 * compared:
        raise ValueError(
            f"{chunks} chunks are too few to compare {compared} after filling with the last {compared}: raise "
            f"endurance.video_frames above {workload.video_frames * (begun + 2 * compared)}"
        )
    for number in range(begun, chunks):
        course.advance()
        if number % max(1, chunks // 10) == 0:
            page.say(f"{variant.label}: {number * workload.video_frames:,} video frames")
            page.keep([], {CURVE: course.curve})
    steady = course.chunks[begun:]
    first, last = rates(steady[:compared]), rates(steady[-compared:])
    peaks = [int(row["peak_chunk"]) for row in course.curve[begun:] if "peak_chunk" in row]
    held = [int(row["cache_bytes"]) for row in course.curve[begun:]]
    return {
        "method": variant.name,
        "budget": variant.budget,
        "layers": workload.layers,
        "video_frames": workload.video_frames * len(course.chunks),
        "latent_frames": course.rollout.next_frame,
        "compared_frames": workload.video_frames * compared,
        "fps_first": first.commit,
        "fps_last": last.commit,
        "last_over_first": last.commit / first.commit,
        "p99_first": first.latency_p99,
        "p99_last": last.latency_p99,
        "wall_s": sum(times.wall for times in course.chunks),
        "peak_first": peaks[0] if peaks else None,
        "peak_last": peaks[-1] if peaks else None,
        "peak_spread": max(peaks) - min(peaks) if peaks else None,
        "cache_spread": max(held) - min(held),
        **filled,
        **course.peaks(),
        "engine": course.rollout.state.engine,
        **course.rollout.state.reading.record,
        "captured": course.captured,
        "execution": str(workload.execution),
        "weights": workload.weights,
    }, course


def _text(row: dict[str, Any]) -> dict[str, str]:
    spread = row["peak_spread"]
    return {
        "method": row["method"],
        "budget": "–" if row["budget"] is None else f"{row['budget']:g}",
        "layers": str(row["layers"]),
        "video frames": f"{row['video_frames']:,}",
        f"fps, first {row['compared_frames']:,}": f"{row['fps_first']:.4g}",
        f"fps, last {row['compared_frames']:,}": f"{row['fps_last']:.4g}",
        "last / first": f"{row['last_over_first']:.4f}",
        "peak of a chunk, last (bytes)": "–" if row["peak_last"] is None else f"{row['peak_last']:,}",
        "greatest less least": "–" if spread is None else f"{spread:,}",
        "minutes": f"{row['wall_s'] / 60:.1f}",
    }
