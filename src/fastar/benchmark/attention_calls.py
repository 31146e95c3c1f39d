"""Attention calls as a rollout makes them, on random vectors, and how far results are from the reference engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastar import engines
from fastar.engines.augmented import augment_keys, augment_queries
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


@dataclass(frozen=True)
class Call:
    """One attention call: q [B, H, Lq, D], k and v [B, H, Lk, D], and what `engines.attend` takes beside them.

    head_dim: of the vectors, where q and k are wider for the log-counts inside them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_count: Tensor | None
    plan: BlockPlan | None
    head_dim: int | None = None

    def kept_for(self, engine: str) -> Call:
        """The same call with its log-counts in the keys."""
        if self.log_count is None:
            return self
        head_dim = self.q.shape[-1]
        width = engines.key_width(engine, head_dim)
        q, k = augment_queries(self.q, width), augment_keys(self.k, self.log_count, width)
        return replace(self, q=q, k=k, log_count=None, head_dim=head_dim)

    def run(self, engine: str) -> Tensor:
        """Its output, [B, H, Lq, D]."""
        options: dict[str, Any] = {"log_count": self.log_count, "plan": self.plan, "head_dim": self.head_dim}
        return engines.attend(self.q, self.k, self.v, engine=engine, **options)[0]

    def unfit(self, engine: str) -> str | None:
        """Why the engine cannot execute it here, or None."""
        full = engines.AttentionCall(
            self.q, self.k, self.v, self.log_count, self.plan, return_lse=False, head_dim=self.head_dim
        )
        chosen = engines.get(engine)
        return chosen.unfit_for_device(self.q.device) or chosen.unfit_for(full)


class Inputs:
    """The same vectors for all cases of one number of keys.

    kept: keys lie in the order of every plan.
    """

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

    def of(self, case: Case) -> Call:
        """The call of a case, plans being drawn anew each time."""
        log_count = self.log_count if case.biased else None
        plan = self._plan(case.density) if case.density < 1 else None
        return Call(self.q, self.k, self.v, log_count, plan)

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


def error_of(call: Call, out: Tensor, block_q: int) -> float:
    """Relative error of `out` for the first and the last queries, in plan order, to the reference engine.

    The last ones are those that an engine may compute in another way (`fastar.engines.waves`).
    """
    queries = call.q.shape[2]
    last = (queries - 1) // block_q
    pairs = [_checked(call, out, block, block * block_q, block_q) for block in sorted({0, last})]
    found, expected = (torch.cat(side, dim=2) for side in zip(*pairs, strict=True))
    return float((found - expected).norm() / expected.norm())


def _checked(call: Call, out: Tensor, block: int, start: int, block_q: int) -> tuple[Tensor, Tensor]:
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
