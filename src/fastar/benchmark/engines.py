"""Every attention engine on the calls a rollout makes: dense, with log-counts, block-sparse, and both.

Inputs are random normal vectors and plans are random blocks: the time of a kernel hardly depends on them, and nothing
is said about quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar import engines
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import matmul_flops, timed
from fastar.cache.slots import SlotFormat
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.packed import Packed, attend_packed
from fastar.engines.plan import BlockPlan

CHECKED = 128  # queries at either end whose output is held against the reference engine


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of an attention call; the defaults are one chunk of Wan2.1-1.3B at 480x832."""

    batch: int = 1
    heads: int = 12
    head_dim: int = 128
    queries: int = 4680
    block_q: int = 128
    block_k: int = 128


@dataclass(frozen=True)
class Case:
    """One kind of call: a share of the key blocks (1 is dense), with or without log-counts."""

    density: float
    biased: bool

    @property
    def kind(self) -> str:
        """dense, biased, sparse or sparse biased."""
        return " ".join(["sparse"] * (self.density < 1) + ["biased"] * self.biased) or "dense"


def cases(densities: Sequence[float]) -> list[Case]:
    """Dense and every density, each with and without log-counts; dense first."""
    return [Case(density, biased) for density in (1.0, *densities) for biased in (False, True)]


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
        inputs, options = _Inputs(geometry, count, device, dtype, seed, kept), _Timed(repeats, captured)
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


@dataclass(frozen=True)
class _Call:
    q: Tensor
    k: Tensor
    v: Tensor
    log_count: Tensor | None
    plan: BlockPlan | None
    head_dim: int | None = None

    def kept_for(self, engine: str) -> _Call:
        """The same call with its log-counts in the keys."""
        if self.log_count is None:
            return self
        head_dim = self.q.shape[-1]
        width = engines.key_width(engine, head_dim)
        q, k = augment_queries(self.q, width), augment_keys(self.k, self.log_count, width)
        return replace(self, q=q, k=k, log_count=None, head_dim=head_dim)

    def run(self, engine: str) -> Tensor:
        options: dict[str, Any] = {"log_count": self.log_count, "plan": self.plan, "head_dim": self.head_dim}
        return engines.attend(self.q, self.k, self.v, engine=engine, **options)[0]

    def unfit(self, engine: str) -> str | None:
        """Why the engine cannot execute it here, or None."""
        full = engines.AttentionCall(
            self.q, self.k, self.v, self.log_count, self.plan, return_lse=False, head_dim=self.head_dim
        )
        chosen = engines.get(engine)
        return chosen.unfit_for_device(self.q.device) or chosen.unfit_for(full)


class _Inputs:
    """The same vectors for all cases of one number of keys."""

    def __init__(
        self, geometry: Geometry, keys: int, device: torch.device, dtype: torch.dtype, seed: int, kept: bool
    ) -> None:
        self.geometry, self.keys, self.device, self.kept = geometry, keys, device, kept
        self.generator = torch.Generator(device).manual_seed(seed)
        lead = (geometry.batch, geometry.heads)
        lengths = (geometry.queries, keys, keys)
        self.q, self.k, self.v = (
            torch.randn(*lead, n, geometry.head_dim, generator=self.generator, device=device).to(dtype)
            for n in lengths
        )
        counts = torch.randint(1, 17, (*lead, keys), generator=self.generator, device=device)
        self.log_count = counts.float().log()

    def of(self, case: Case) -> _Call:
        log_count = self.log_count if case.biased else None
        plan = self._plan(case.density) if case.density < 1 else None
        return _Call(self.q, self.k, self.v, log_count, plan)

    def _plan(self, density: float) -> BlockPlan:
        """Queries in random order, keys too unless kept in place; as many random key blocks for every query block."""
        g, lead = self.geometry, (self.geometry.batch, self.geometry.heads)
        blocks = (-(-g.queries // g.block_q), -(-self.keys // g.block_k))
        chosen = max(1, round(density * blocks[1]))
        scores = torch.rand(*lead, *blocks, generator=self.generator, device=self.device)
        mask = torch.zeros(scores.shape, dtype=torch.bool, device=self.device)
        mask.scatter_(-1, scores.topk(chosen, dim=-1).indices, True)
        return BlockPlan(
            query_order=self._order(g.queries),
            key_order=None if self.kept else self._order(self.keys),
            block_q=g.block_q,
            block_k=g.block_k,
            block_mask=mask,
            max_blocks=chosen,
            lengths=(g.queries, self.keys),
        )

    def _order(self, length: int) -> Tensor:
        lead = (self.geometry.batch, self.geometry.heads)
        return torch.rand(*lead, length, generator=self.generator, device=self.device).argsort(-1)


def _row(
    name: str, case: Case, call: _Call, geometry: Geometry, options: _Timed, kept: bool
) -> dict[str, Any]:
    made = call.kept_for(name) if kept else call
    return _measured(name, case, call, lambda: made.run(name), geometry, options, made.unfit(name))


def _packed_row(bits: int, case: Case, call: _Call, geometry: Geometry, options: _Timed) -> dict[str, Any]:
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
    call: _Call,
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
        distance = _error(call, run(), geometry.block_q)
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


def _error(call: _Call, out: Tensor, block_q: int) -> float:
    """Relative error of `out` for the first and the last queries, in plan order, to the reference engine.

    The last ones are those that an engine may compute in another way (`fastar.engines.waves`).
    """
    queries = call.q.shape[2]
    last = (queries - 1) // block_q
    pairs = [_checked(call, out, block, block * block_q, block_q) for block in sorted({0, last})]
    found, expected = (torch.cat(side, dim=2) for side in zip(*pairs, strict=True))
    return float((found - expected).norm() / expected.norm())


def _checked(call: _Call, out: Tensor, block: int, start: int, block_q: int) -> tuple[Tensor, Tensor]:
    """What the queries of a block, at most `CHECKED`, have and should have, float32 [B, H, queries, D]."""
    stop = min(start + min(CHECKED, block_q), call.q.shape[2])
    plan, log_count, k, v = call.plan, call.log_count, call.k, call.v
    rows = torch.arange(start, stop, device=k.device).expand(*k.shape[:2], stop - start)
    if plan is not None:
        rows = plan.query_index[..., start:stop]
        read = plan.block_mask[:, :, block].repeat_interleave(plan.block_k, -1)[..., : plan.num_keys]
        k, v = (x.gather(2, plan.key_index[..., None].expand(x.shape)) for x in (k, v))
        counts = torch.zeros_like(read, dtype=torch.float32) if log_count is None else log_count
        log_count = counts.gather(2, plan.key_index).masked_fill(~read, -torch.inf)
    rows = rows[..., None].expand(*rows.shape, call.q.shape[-1])
    expected, _ = engines.attend(
        call.q.gather(2, rows).float(), k.float(), v.float(), log_count=log_count, engine="reference"
    )
    return out.gather(2, rows).float(), expected


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
