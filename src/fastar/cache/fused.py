"""The plan of a TempCache commit for all layers at once, by the kernels of `fastar.cache.kernels` and `merge_kernels`.

The same steps as `fastar.cache.allocation` and `fastar.cache.middle`, which define them. What differs is how numbers
are held: features about their mean, in the dtype of the slots (bfloat16), made by one pass over these; distances are
those of such features. And where: slots that merge may come in any order, as long as partners are newer, except those
that enter, which are the last, frame by frame. Legend as there; N problems are layers x batch x heads, indices int32.

The floor, for a layer of Wan2.1-1.3B on an H100 (12 heads of 128, 9,184 slots and 4,680 that enter; 3 TB/s), searched
and priced by 64 numbers (`match_width`, `cost_by`): these 85 MB in and 21 MB out, 35 us; partners 77 GFLOP, 0.13 ms at
600 TFLOP/s, and as long for the larger of two scores; costs three rows of 128 bytes a slot, mostly from L2; merged
rows 29 MB in, 20 MB out, 16 us; moves 58 MB, 20 us.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastar.ann.launch import nearest_allowed
from fastar.cache.allocation import CostBy
from fastar.cache.fused_merge import Runs, find_roots, lowest, places
from fastar.cache.launch import blocks, kernels, or_unused, padded, precision_of
from fastar.cache.merge import Weighting, rows_of
from fastar.cache.moments import sampled
from fastar.interpreter import interpreted

_SPAN = 2048  # slots that one program sums


@dataclass
class FusedSlots:
    """Slots that may merge.

    Attributes:
        features: what costs are of, [N, M, 2 D], or what is searched by.
        searched: what the search compares: the features, or [N, M, W] of them.
        offset: float32 [N, M], -|searched|^2 / 2.
        count: tokens a slot stands for, float [N, M].
    """

    features: Tensor
    searched: Tensor
    offset: Tensor
    count: Tensor

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        count: Tensor,
        factor: Tensor,
        value_weight: float,
        projection: Tensor | None,
        cost_by: CostBy = "features",
    ) -> FusedSlots:
        """Of slots [B, H, M, D], batches H heads apart, and a factor [N, D, D] of the queries' moment.

        projection: [2 D, W], or None to search by the features. cost_by: `searched`, and there are no others.
        """
        batch, heads, size, width = key.shape
        some = sampled(key).shape[2]
        key_mean, second = (x / some for x in moments(sampled(key)))
        value_mean, squares = (x / some for x in moments(sampled(value), full=False))
        covariance = second - key_mean[:, :, None] * key_mean[:, None]
        key_variance = ((covariance @ factor) * factor).sum((1, 2))
        value_variance = (squares - value_mean.square()).sum(1)
        scale = (value_weight * key_variance.clamp_min(0) / value_variance.clamp_min(1e-12)).sqrt()
        dtype = torch.float32 if key.dtype == torch.float32 else torch.bfloat16
        seen = 2 * width if projection is None else projection.shape[1]
        searched = key.new_empty(batch * heads, size, seen, dtype=dtype)
        offset = searched.new_empty(batch * heads, size, dtype=torch.float32)
        strides = (key.stride(1), key.stride(2), value.stride(1), value.stride(2))
        sizes = {"D": width, "WIDTH": padded(width), "UPCAST": interpreted(), "PRECISION": precision_of(key)}
        if projection is not None and cost_by == "searched":
            key_map = (factor @ projection[:width]).to(dtype)
            value_map = (scale[:, None, None] * projection[width:]).to(dtype)
            block = 128
            kernels().project[(blocks(size, block), batch * heads)](
                key, value, key_mean, value_mean, key_map, value_map, searched, offset, size, *strides,
                W=seen, BLOCK=block, num_warps=8, **sizes,
            )  # fmt: skip
            return cls(searched, searched, offset, count)
        features = searched
        if projection is not None:
            projection = projection.to(dtype)
            features = searched.new_empty(batch * heads, size, 2 * width)
        block = 64
        kernels().features[(blocks(size, block), batch * heads)](
            key, value, key_mean, value_mean, factor, scale, features if projection is None else projection,
            features, searched, offset, size, *strides,
            W=16 if projection is None else seen, BLOCK=block, PROJECT=projection is not None, num_warps=8, **sizes,
        )  # fmt: skip
        return cls(features, searched, offset, count)


def moments(*parts: Tensor, full: bool = True, span: int = _SPAN) -> tuple[Tensor, Tensor]:
    """Sum of x [B, H, M, D] over M, [N, D], and of x x^T, [N, D, D], or of the squares, [N, D], float32.

    parts: of the same shape, x as one after the other along B. span: rows that are summed at once.
    """
    batch, heads, size, width = parts[0].shape
    spans = blocks(size, span)
    lead = (len(parts), batch * heads, spans, width)
    sums = parts[0].new_empty(lead, dtype=torch.float32)
    squares = sums.new_empty((*lead, width) if full else lead)
    for number, part in enumerate(parts):
        x = part if part.stride(3) == 1 else part.contiguous()
        kernels().moments[(spans, batch * heads)](
            x, sums[number], squares[number], size, span, heads, *x.stride()[:3],
            D=width, WIDTH=padded(width), BLOCK=64,
            FULL=full, UPCAST=interpreted(), PRECISION=precision_of(x), num_warps=8, num_stages=4,
        )  # fmt: skip
    return sums.flatten(0, 1).sum(1), squares.flatten(0, 1).sum(1)


def moment_factors(moment: Tensor) -> Tensor:
    """`fastar.ann.similarity.moment_factor` / sqrt(D) of moments [N, D, D], by one kernel for all."""
    width = moment.shape[-1]
    ridge = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].clamp_min(1e-12) * 1e-4
    ridged = moment + torch.diag_embed(ridge.expand(moment.shape[:-1]))
    factor = torch.empty_like(ridged)
    kernels().cholesky[(len(moment),)](
        ridged, factor, D=width, WIDTH=padded(width), SCALE=width**-0.5, num_warps=16
    )
    return factor


def match(
    slots: FusedSlots,
    partner: Tensor,
    known: int,
    frame: int,
    weighting: Weighting,
    match_frames: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastar.cache.allocation.match`: partner int32 and cost [N, M], in one search of all that have newer slots."""
    problems, size, width = slots.searched.shape
    entered = size - known
    partner = torch.where(partner < known, partner, -1)
    found = torch.full_like(partner, -1)
    least = 0 if match_frames is None else max(0, entered - match_frames * frame)
    narrow = width * slots.searched.element_size() <= 512
    queries, keys = (128, 64) if narrow else (64, 32)
    bits = (blocks(entered + 1, keys) - 1).bit_length()
    if size > frame:
        kernels().nearest_newer[(blocks(size - frame, queries), problems)](
            slots.searched, slots.offset, found, size, known, frame, least,
            F=width, WIDTH=padded(width), Q=queries, K=keys, MASK=(1 << bits) - 1,
            UPCAST=interpreted(), PRECISION="ieee",
            num_warps=4 if width <= 128 else 8, num_stages=3,
        )  # fmt: skip
    return cheaper_partner(slots, partner, found, weighting)


def choose(
    slots: FusedSlots,
    partner: Tensor,
    cost: Tensor,
    surplus: int,
    rounds: int,
    weighting: Weighting,
    *,
    first: int,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Runs, Tensor]:
    """`fastar.cache.allocation.choose`; the features, from column `first` on, and counts of `slots` become the groups'.

    Features do so only if they are needed `again` after the last round.

    Returns:
        root int32, gone uint8, partner int32 [N, M], the runs of all that moved, these int32 [N, surplus], ascending.
    """
    gone, root = torch.zeros_like(partner, dtype=torch.uint8), None
    done = [surplus * step // rounds for step in range(rounds + 1)]
    for left, (before, after) in enumerate(pairwise(done), start=1 - rounds):
        chosen, rows = lowest(cost, after - before, gone)
        step = find_roots(chosen, partner)
        wide = step.long()
        root = step if root is None else wide.gather(1, root.long()).to(torch.int32)
        gone = gone | chosen
        moved = wide.gather(1, partner.clamp_min(0).long()).to(torch.int32)
        partner = torch.where(partner < 0, -1, moved)
        runs = Runs.of(rows, step)
        if again and slots.searched is not slots.features:
            runs.fold(slots.searched, slots.count)
        if again or left:
            runs.fold(slots.features, slots.count, first=first)
        slots.count = runs.total(slots.count)
        if left:
            _, cost = cheaper_partner(slots, partner, None, weighting)
    assert root is not None
    if rounds > 1:
        rows = places(gone, surplus, wanted=True)
        runs = Runs.of(rows, root)
    return root, gone, partner, runs, rows


def renew(
    slots: FusedSlots,
    keep: Tensor,
    partner: Tensor,
    before: Tensor,
    number: int,
    frame: int,
    weighting: Weighting,
) -> Tensor:
    """`fastar.cache.allocation.renew` of the slots `keep` int32 [N, K], oldest first: their partners [N, K].

    Everything else is by all slots' numbers: partner of the slots kept [N, K], cost `before` [N, K] of these.
    """
    _, cost = cheaper_partner(slots, partner, None, weighting, rows=keep)
    worse = torch.where(partner < 0, torch.inf, cost - before)
    worse[:, -frame:].fill_(-torch.inf)
    rows = lowest(-worse, number)[1]
    wide, kept = rows.long(), keep.long()
    searched = rows_of(slots.searched, kept)
    offset = searched.float().square().sum(-1) * -0.5
    index = nearest_allowed(rows_of(searched, wide), searched, offset, _upto(rows + 1))
    found = torch.where(index < 0, -1, keep.gather(1, index.clamp_min(0).long()))
    best, _ = cheaper_partner(slots, partner.gather(1, wide), found, weighting, rows=keep.gather(1, wide))
    return partner.scatter(1, wide, best)


def cheaper_partner(
    slots: FusedSlots,
    partner: Tensor,
    found: Tensor | None,
    weighting: Weighting,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cheaper one of two partners int32 [N, R] of the slots `rows` (None: all), and its cost."""
    size, width = slots.features.shape[1:]
    count = partner.shape[1]
    best, cost = torch.empty_like(partner), torch.empty_like(partner, dtype=torch.float32)
    block = max(16, 4096 // padded(width))
    kernels().cheaper_partner[(blocks(count, block), len(partner))](
        slots.features, slots.count, or_unused(rows, partner), partner.contiguous(), or_unused(found, partner),
        best, cost, size, count, F=width, WIDTH=padded(width), BLOCK=block, WEIGHTING=weighting,
        ROWS=rows is not None, FOUND=found is not None, num_warps=4,
    )  # fmt: skip
    return (partner if found is None else best), cost


def _upto(high: Tensor) -> Tensor:
    """Keys before `high` int32 [N, n] or [n] are excluded."""
    high = high if high.dim() == 2 else high[None]
    return torch.stack([torch.zeros_like(high), high])
