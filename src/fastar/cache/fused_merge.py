"""Which slots of a TempCache commit merge, where each ends, and how the rest moves: by `fastar.cache.merge_kernels`.

As `fastar.cache.merge` does in PyTorch. Legend as in `fastar.cache.fused`, whose steps these are parts of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.cache.launch import blocks, merge_kernels, or_unused, padded, precision_of
from fastar.interpreter import interpreted

_BLOCK = 4096  # slots that one program looks at at a time


def lowest(cost: Tensor, number: int, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `number` lowest of each row of cost [N, M]; of equals the first. Those `gone` uint8 [N, M] come last.

    Returns:
        chosen uint8 [N, M], and which they are, ascending, int32 [N, number].
    """
    problems, size = cost.shape
    chosen = torch.empty(problems, size, dtype=torch.uint8, device=cost.device)
    rows = torch.empty(problems, number, dtype=torch.int32, device=cost.device)
    merge_kernels().lowest[(problems,)](
        cost.contiguous(), or_unused(gone, chosen), chosen, rows, size, number,
        BLOCK=min(_BLOCK, padded(size)), GONE=gone is not None, num_warps=16,
    )  # fmt: skip
    return chosen, rows


def places(flags: Tensor, number: int, *, wanted: bool) -> Tensor:
    """Where flags uint8 [N, M] are 1 (0, if not `wanted`), `number` in each row: int32 [N, number], ascending."""
    problems, size = flags.shape
    rows = torch.empty(problems, number, dtype=torch.int32, device=flags.device)
    merge_kernels().places[(problems,)](
        flags, rows, size, number, BLOCK=min(_BLOCK, padded(size)), WANTED=int(wanted), num_warps=16
    )
    return rows


def find_roots(chosen: Tensor, partner: Tensor) -> Tensor:
    """Where the chain of each slot ends, int32 [N, M]: a `chosen` one with a partner goes on to that."""
    size, block = partner.shape[1], 256
    for hops in (16, size):  # a long chain: few hops, then as many of them at a time
        root = torch.empty_like(partner)
        merge_kernels().find_roots[(blocks(size, block), len(partner))](
            chosen, partner, root, size, hops, BLOCK=block
        )
        partner = root
    return root


@dataclass
class Runs:
    """Slots that leave, [N, R], sorted by where they end: `fastar.cache.merge.Joins` for the kernel."""

    order: Tensor
    target: Tensor

    @classmethod
    def of(cls, rows: Tensor, root: Tensor) -> Runs:
        """Of the slots rows int32 [N, R], ascending, which end in root int32 [N, M]."""
        target, at = root.gather(1, rows.long()).sort(dim=1, stable=True)
        return cls(rows.gather(1, at), target)

    def total(self, count: Tensor) -> Tensor:
        """Sum of count [N, M] over each group, at its root; other slots keep theirs."""
        return self.fold(count.clone()[..., None], count, total=True)

    def fold(self, x: Tensor, count: Tensor, *, first: int = 0, total: bool = False) -> Tensor:
        """Write each group's mean over its root's row of x [N, M, F], in place.

        Means are weighted by count [N, M]; columns before `first` stay. Returns the groups' counts if `total`.
        """
        (_, _, width), moved, block = x.shape, self.order.shape[1], 64
        totals, columns = count.clone() if total else count, padded(width - first)
        merge_kernels().fold[(blocks(moved, block), len(x))](
            x, count, self.order, self.target, totals, moved, x.stride(0), x.stride(1), count.stride(0), FIRST=first,
            F=width, WIDTH=columns, BLOCK=block, TOTAL=total,
            UPCAST=interpreted(), PRECISION=precision_of(x), num_warps=4 if columns <= 128 else 8,
        )  # fmt: skip
        return totals


def places_of_last(gone: Tensor, rows: Tensor) -> Tensor:
    """Where the last R slots go when so many are gone: to the first that are, in order. int32 [N, R], -1: it is gone.

    gone uint8 [N, M]; rows int32 [N, R], those that are, ascending.
    """
    stays = gone[:, gone.shape[1] - rows.shape[1] :] == 0
    number = stays.cumsum(1, dtype=torch.int64) - 1
    return torch.where(stays, rows.gather(1, number.clamp_min_(0)), -1)


def fill(x: Tensor, place: Tensor) -> Tensor:
    """Move the last R slots of x [B, H, M, ...], in place, to slots `place` int32 [N, R] before them; not if -1."""
    rows = x.flatten(0, 1)
    size, moved, width = rows.shape[1], place.shape[1], rows[0, 0].numel()
    block = 64 if width > 1 else 1024
    merge_kernels().fill[(blocks(moved, block), len(rows))](
        rows, place, size - moved, moved, rows.stride(0), rows.stride(1),
        F=width, WIDTH=1 << (width - 1).bit_length(), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return x
