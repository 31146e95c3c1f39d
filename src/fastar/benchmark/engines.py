"""Every attention engine on the calls a rollout makes: dense, with log-counts, block-sparse, and both.

Inputs are random normal vectors and plans are random blocks: the time of a kernel hardly depends on them, and nothing
is said about quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar import engines
from fastar.benchmark.attention_calls import Call, Case, Geometry, Inputs, cases, error_of
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import matmul_flops, timed
from fastar.cache.slots import SlotFormat
from fastar.engines.packed import Packed, attend_packed


def benchmark(
    names: Sequence[str],
    keys: Sequence[int],
    densities: Sequence[float],
    geometry: Geometry,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 7,
    seed: int = 0,
    kept: bool = True,
    packed_bits: Sequence[int] = (),
    captured: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows engine, kind, keys, density, ms, ms_low and ms_high (quartiles), captured, tflops and so on.

    Besides of_dense, of_best, error and reason. tflops counts 4 * executed pairs * head_dim * heads; of_dense is its
    ratio to the same engine's dense call with as many keys, of_best that to the fastest engine's. error is relative to
    float32, over `CHECKED` first and last queries. An engine that cannot execute a call has a reason and no numbers.

    kept: keys are as a rollout keeps them between passes, so that no copy of them is timed: log-counts in the keys, at
    the engine's own width, and keys in the order of the plan. The queries of a plan are put in order in each call.

    packed_bits: also attention over slots of so many bits (`fastar.engines.packed`), as engine `packed int8` and so on:
    biased calls whose last keys, as many as queries, are a current chunk that is not packed. Their error is that of the
    kernel, not that of rounding to so few bits.

    captured: time CUDA graphs of the calls; an engine that waits for the host in them has a reason and no numbers.
    None: on a GPU, and what waits is timed as it is, the host's part with it; the column `captured` says which.

    Raises:
        ValueError: an engine is unknown.
    """
    for count in keys:
        inputs, options = Inputs(geometry, count, device, dtype, seed, kept), _Timed(repeats, captured)
        calls = [(case, inputs.of(case)) for case in cases(densities)]
        rows = [_row(name, case, call, geometry, options, kept) for case, call in calls for name in names]
        biased = Case(1.0, biased=True)
        rows += [_packed_row(bits, biased, inputs.of(biased), geometry, options) for bits in packed_bits]
        dense = {row["engine"]: row["tflops"] for row in rows if row["kind"] == "dense" and row["tflops"]}
        for row in rows:
            baselines = {"of_dense": dense.get(row["engine"]), "of_best": max(dense.values(), default=None)}
            for share, baseline in baselines.items():
                row[share] = row["tflops"] / baseline if row["tflops"] and baseline else None
            yield row


class _Timed(NamedTuple):
    repeats: int
    captured: bool | None


def _row(
    name: str, case: Case, call: Call, geometry: Geometry, options: _Timed, kept: bool
) -> dict[str, Any]:
    made = call.kept_for(name) if kept else call
    return _measured(name, case, call, lambda: made.run(name), geometry, options, made.unfit(name))


def _packed_row(bits: int, case: Case, call: Call, geometry: Geometry, options: _Timed) -> dict[str, Any]:
    current = min(geometry.queries, call.k.shape[2] // 2)
    form = SlotFormat(bits, group=min(64, geometry.head_dim))
    slots, unpacked = [], []
    for x in (call.k, call.v):
        fields = form.pack("x", x[:, :, :-current])
        slots.append(Packed(*fields.values()))
        unpacked.append(torch.cat([form.unpack("x", fields, x.dtype), x[:, :, -current:]], dim=2))
    k, v = (x[:, :, -current:] for x in (call.k, call.v))
    assert call.log_count is not None
    log_count = call.log_count.clone()
    log_count[..., -current:] = 0
    past = log_count[..., :-current].contiguous()
    return _measured(
        f"packed int{bits}", case, replace(call, k=unpacked[0], v=unpacked[1], log_count=log_count),
        lambda: attend_packed(call.q, slots[0], slots[1], k, v, log_count=past)[0], geometry, options, None,
    )  # fmt: skip


def _measured(
    name: str,
    case: Case,
    call: Call,
    run: Callable[[], Tensor],
    geometry: Geometry,
    options: _Timed,
    reason: str | None,
) -> dict[str, Any]:
    """The row of `run`, which executes `call`."""
    density = 1.0 if call.plan is None else float(call.plan.density().mean())
    row: dict[str, Any] = {
        "engine": name, "kind": case.kind, "keys": call.k.shape[2], "density": density,
        "ms": None, "ms_low": None, "ms_high": None, "captured": None, "tflops": None,
        "error": None, "reason": reason,
    }  # fmt: skip
    if reason is not None:
        return row
    try:
        time = timed(run, device=call.q.device, **options._asdict())
        distance = error_of(call, run(), geometry.block_q)
    except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that its limits do not describe
        return row | {"reason": str(error).split("\n")[0]}
    pairs = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.k.shape[2] * density
    return row | {
        "ms": 1e3 * time.median,
        "ms_low": 1e3 * time.low,
        "ms_high": 1e3 * time.high,
        "captured": time.captured,
        "tflops": 4 * pairs * geometry.head_dim / time.median / 1e12,
        "error": distance,
    }


def run_engines(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `engines`.

    Raises:
        ValueError: an unknown engine.
    """
    names = list(config.engines) if config.engines is not None else engines.names()
    for name in names:
        engines.get(name)  # unknown ones are told of before minutes of measuring
    geometry = instantiate(config.geometry)
    peak = matmul_flops(page.device, page.dtype, size=config.matmul_size, repeats=config.repeats) / 1e12
    page.card(
        {"matmul_tflops": peak, "geometry": geometry.__dict__, "kept": config.kept},
        f"products of {config.matmul_size} x {config.matmul_size} matrices run at {peak:.3g} TFLOP/s, the ceiling. "
        f"{geometry}",
    )
    rows: Rows = []
    for row in benchmark(
        names, list(config.keys_per_call), list(config.densities), geometry,
        device=page.device, dtype=page.dtype, repeats=config.repeats, seed=config.seed, kept=config.kept,
        packed_bits=list(config.packed_bits), captured=config.captured,
    ):  # fmt: skip
        rows.append(row | {"ceiling_share": None if row["tflops"] is None else row["tflops"] / peak})
        page.keep(rows, {})
    page.show([_text(row) for row in rows], "attention engines: median of the repeats")
    return rows, {}


def _text(row: dict[str, Any]) -> dict[str, str]:
    named = {
        "engine": row["engine"],
        "call": row["kind"],
        "keys": f"{row['keys']:,}",
        "density": f"{row['density']:.2f}",
    }
    if row["reason"] is not None:
        return named | {"ms": "–", "note": str(row["reason"])}
    return named | {
        "ms": f"{row['ms']:.3g} [{row['ms_low']:.3g}, {row['ms_high']:.3g}]",
        "captured": "yes" if row["captured"] else "no",
        "TFLOP/s": f"{row['tflops']:.3g}",
        "of ceiling": f"{row['ceiling_share']:.0%}",
        "of own dense": f"{row['of_dense']:.2f}" if row["of_dense"] else "–",
        "of best dense": f"{row['of_best']:.2f}" if row["of_best"] else "–",
        "error": f"{row['error']:.1e}",
    }
