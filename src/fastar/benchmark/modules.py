"""The mode `modules`: where the time of a chunk goes, by parts timed alone and by a profile of a whole chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from fastar import engines
from fastar.attention.events import AttendEvent
from fastar.attention.packed import PackedKeys, PackedPast
from fastar.attention.state import AttentionState
from fastar.benchmark.ceiling import Ceiling, show_card
from fastar.benchmark.course import Course
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import timed
from fastar.benchmark.trace import traced
from fastar.benchmark.workload import Variant, Workload, open_workload
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.plan import BlockPlan, take_rows
from fastar.sparsity import SelectRequest

TIMED_CHUNKS = 5
MERGE, PLAN = "match, merge, write", "plan"


@dataclass(frozen=True)
class Subject:
    """What a part is timed of.

    Attributes:
        workload, variant, ceiling: see there.
        course: the method in its steady state, captured if passes are.
        passes_ms: of each denoising pass of a chunk, in order, and of its commit.
        config, page: of the command.
    """

    workload: Workload
    variant: Variant
    ceiling: Ceiling
    course: Course
    passes_ms: list[float]
    config: DictConfig
    page: Page


Part = Callable[[Subject], Rows]
"""Times something alone: rows part, ms (of all its calls in a chunk), calls, how."""


def run_modules(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `modules`: rows method, budget, part, ms, calls, share (of a chunk's time), how.

    `how` is `alone` (timed by itself, times its calls in a chunk), `difference` or `sum` (of such), or `profile` (sums
    of kernels in one chunk; there, `gaps` is time in which the device did nothing, and `waits` counts how often the
    host waited for it).
    """
    frames = config.steady.fill_frames + config.backbone.chunk_frames * (
        config.steady.warmup + 2 * TIMED_CHUNKS + 3
    )
    workload = open_workload(config, page, latent_frames=frames)
    ceiling = show_card(workload, config, page)
    rows: Rows = []
    kernels: Rows = []
    for variant in workload.variants:
        named = {"method": variant.name, "budget": variant.budget}
        try:
            own, found = _measured(workload, variant, ceiling, config, page)
        except (RuntimeError, ValueError) as error:
            own, found = [{"part": "chunk", "reason": str(error).split("\n")[0]}], []
        rows += [named | row for row in own]
        kernels += [named | row for row in found]
    page.show([_text(row) for row in rows], "a chunk's time, by parts")
    return rows, {"modules_kernels": kernels}


def _measured(
    workload: Workload, variant: Variant, ceiling: Ceiling, config: DictConfig, page: Page
) -> tuple[Rows, Rows]:
    course = Course(workload, variant)
    course.fill(config.steady.fill_frames)
    course.run(config.steady.warmup)
    chunks = course.run(TIMED_CHUNKS)
    chunk_ms = 1e3 * float(np.median([sum(times.parts.values()) for times in chunks]))
    passes_ms = [float(ms) for ms in np.median([_passes(course) for _ in range(TIMED_CHUNKS)], axis=0)]
    subject = Subject(workload, variant, ceiling, course, passes_ms, config, page)
    how = "captured" if course.captured else "not captured"
    rows: Rows = [{"part": f"chunk, {how}", "ms": chunk_ms, "calls": 1, "how": "alone"}]
    for part in PARTS:
        rows += part(subject)
    ours = sum(row["ms"] for row in rows if row["part"] in (MERGE, PLAN))
    rows.append({"part": "match, merge, plan", "ms": ours, "calls": None, "how": "sum"})
    for row in rows:
        row["share"] = row["ms"] / chunk_ms

    trace = traced(_one_chunk(course), workload.device)
    span = trace.span_us / 1000
    kinds: Rows = [
        {"part": kind, "ms": ms, "calls": count, "share": ms / span, "how": "profile"}
        for kind, (ms, count) in trace.by_kind().items()
    ]
    gaps = trace.gap_us / 1000
    kinds.append({"part": "gaps", "ms": gaps, "calls": None, "share": gaps / span, "how": "profile"})
    waits = sum(trace.waits.values())
    kinds.append({"part": "waits", "ms": None, "calls": waits, "share": None, "how": "profile"})
    kinds[-1] |= {"waits": dict(trace.waits), "to_host": trace.to_host, "to_device": trace.to_device}
    course.close()
    return [*rows, *kinds], trace.by_name()


def _passes(course: Course) -> list[float]:
    """Milliseconds of each denoising pass of the next chunk, and of its commit."""
    device = course.workload.device
    marks: list[Any] = []

    def mark(_: object = None) -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record(torch.cuda.current_stream(device))
        else:
            marks.append(time.perf_counter())

    truth, actions = course.workload.truth(course.rollout), course.workload.actions(course.rollout)
    mark()
    course.rollout.denoise(actions, on_step=mark)
    course.rollout.commit(truth, actions)
    mark()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [first.elapsed_time(last) for first, last in pairwise(marks)]
    return [1e3 * (last - first) for first, last in pairwise(marks)]


def _one_chunk(course: Course) -> Callable[[], None]:
    """Makes the next chunk, without a timer, which waits."""
    workload, rollout = course.workload, course.rollout
    truth, actions = workload.truth(rollout), workload.actions(rollout)

    def make() -> None:
        rollout.denoise(actions)
        rollout.commit(truth, actions)

    return make


def linear_parts(subject: Subject) -> Rows:
    """All linears of the passes of a chunk, from the card."""
    passes = subject.workload.session.loop.passes_per_chunk
    return [
        {"part": "linears", "ms": passes * subject.ceiling.linears_ms, "calls": passes, "how": "alone"},
    ]


def pass_parts(subject: Subject) -> Rows:
    """Each pass of a chunk where it stands, and what the commit takes beyond a pass: matching, merging, writing.

    That is beyond the fastest dense one, as commits are dense under most schedules; `how` says so if there is none. The
    first pass is slower where attention reads a copy of the cache, which it makes.
    """
    *steps, commit = subject.passes_ms
    rows: Rows = [
        {"part": f"pass {number} of {len(steps)}", "ms": ms, "calls": 1, "how": "alone"}
        for number, ms in enumerate(steps, 1)
    ]
    selector, layers = subject.course.rollout.state.self_selector, range(subject.workload.layers)
    contexts = subject.workload.session.loop.denoise_passes(subject.course.rollout.next_frame)
    dense = [
        ms
        for ms, context in zip(steps, contexts, strict=True)
        if all(selector.is_dense(layer, context) for layer in layers)
    ]
    how = "difference" if dense else "difference to a sparse pass"
    return [
        *rows,
        {"part": "commit pass", "ms": commit, "calls": 1, "how": "alone"},
        {"part": MERGE, "ms": commit - min(dense or steps), "calls": 1, "how": how},
    ]


def attention_parts(subject: Subject) -> Rows:
    """Every kind of attention call of a chunk, and the plans, each timed alone and multiplied by its calls.

    As CUDA graphs if passes are captured. The gathers that put a chunk's keys in the order of a plan are in neither.
    """
    workload, config = subject.workload, subject.config
    calls = _Calls()
    course = Course(workload, subject.variant, capture=False, recorders=[calls])
    course.fill(config.steady.fill_frames)
    with calls.of(course):
        course.advance()
    options: dict[str, Any] = {"device": workload.device, "repeats": config.repeats}
    options["captured"] = subject.course.captured
    engine, rows = course.rollout.state.engine, []
    with torch.inference_mode():
        for kind, (event, count) in calls.kinds.items():
            ms = 1e3 * timed(_attend(event, engine, course.rollout.state), **options).median
            rows.append({"part": f"attend {kind}", "ms": ms * count, "calls": count, "how": "alone"})
        if calls.request is not None:
            request, selector = calls.request, course.rollout.state.self_selector
            ms = 1e3 * timed(lambda: selector.select(request), **options).median  # a step twice plans anew
            count = len(calls.plans)
            rows.append({"part": PLAN, "ms": ms * count, "calls": count, "how": "alone"})
    course.close()
    return rows


def _attend(event: AttendEvent, engine: str, state: AttentionState) -> Callable[[], object]:
    """The call of an event as rollouts make it: log-counts in the keys, these in the order of a plan that is kept.

    Packed slots are those that the cache has by now.
    """
    q, k, v, log_count, plan = event.q, event.k, event.v, event.log_count, event.plan
    if event.stream == "self" and state.reading.packed:
        past, own = PackedPast.of(state.cache.stored(event.layer)), event.current_keys
        packed = PackedKeys(past, k[:, :, -own:], v[:, :, -own:])
        return lambda: packed.attend(q, plan, engine)
    head_dim = q.shape[-1]
    if plan is not None and state.self_selector.keeps_plans:
        k, v = take_rows(k, plan.key_order), take_rows(v, plan.key_order)
        if log_count is not None and plan.key_order is not None:
            log_count = log_count.gather(2, plan.key_order)
        plan = plan.on_ordered_keys
    if event.stream == "self" and log_count is not None:
        width = engines.key_width(engine, head_dim, q.device)
        if width > head_dim:
            q, k = augment_queries(q, width), augment_keys(k, log_count, width)
            log_count = None
    options: dict[str, Any] = {"log_count": log_count, "plan": plan, "engine": engine}
    if q.shape[-1] > head_dim:
        options["head_dim"] = head_dim
    return lambda: engines.attend(q, k, v, **options)


PARTS: tuple[Part, ...] = (pass_parts, linear_parts, attention_parts)
"""What is timed alone; another part is another function here."""


@dataclass
class _Calls:
    """A recorder of one chunk: one attention call of each kind and their number, and what plans are made of."""

    kinds: dict[str, tuple[AttendEvent, int]] = field(default_factory=dict)
    plans: list[BlockPlan] = field(default_factory=list)
    request: SelectRequest | None = None
    _watching: bool = False

    def on_attend(self, event: AttendEvent) -> None:
        if not self._watching:
            return
        how = " ".join(["sparse"] * (event.plan is not None) + ["biased"] * (event.log_count is not None))
        kind = f"{event.stream}{' ' + how if how else ''}"
        first, count = self.kinds.get(kind, (event, 0))
        self.kinds[kind] = (first, count + 1)

    @contextmanager
    def of(self, course: Course) -> Iterator[None]:
        """Watch the chunks that are made within."""
        selector = course.rollout.state.self_selector
        select = selector.select

        def spy(request: SelectRequest) -> BlockPlan | None:
            plan = select(request)
            if plan is not None and all(plan is not other for other in self.plans):
                self.plans.append(plan)
                self.request = self.request or request
            return plan

        vars(selector)["select"], self._watching = spy, True
        try:
            yield
        finally:
            del vars(selector)["select"]
            self._watching = False


def _text(row: dict[str, Any]) -> dict[str, str]:
    named = {
        "method": row["method"],
        "budget": "–" if row["budget"] is None else f"{row['budget']:g}",
        "part": row["part"],
    }
    if "reason" in row:
        return named | {"how": row["reason"]}
    how = row["how"]
    if row["part"] == "waits":
        how += f"; copies to the host {row['to_host']}, to the device {row['to_device']}"
    return named | {
        "ms": "–" if row["ms"] is None else f"{row['ms']:.4g}",
        "calls": "–" if row["calls"] is None else str(row["calls"]),
        "share": "–" if row["share"] is None else f"{row['share']:.1%}",
        "how": how,
    }
