"""Lossless reduction of cross-attention: identical rows as one slot, and kept rows moved together."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_identical(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens whose key and value are both bit-for-bit equal; attention over the result is unchanged.

    Prompts are padded to a fixed length and the pads come out of the text projection as equal rows, so that
    most of a short prompt's cross-attention is one token repeated. m equal keys weigh m times one of them:
    logit + log m (the TempCache lemma, exact here as values are equal too).

    Args:
        k: [B, H, S, D]. v: [B, H, S, Dv].

    Returns:
        k [B, H, S', D], v [B, H, S', Dv] and log_count [B, H, S'] float32, S' the largest number of distinct
        tokens of any head, in order of first occurrence; heads with fewer end in empty slots (-inf). Sizing
        S' is one host sync: do it once per prompt.
    """
    same, members = identical(k, v)
    is_first = same == torch.arange(k.shape[2], device=k.device)
    return _gather_first(k, v, is_first, members.float().log(), int(is_first.sum(-1).max()))


def identical(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens have bit-for-bit equal keys and values, k [B, H, S, D] and v [B, H, S, Dv].

    Returns:
        int64 [B, H, S], index of the first token that is equal.
        int64 [B, H, S], number of tokens whose first equal token this is.
    """
    same = _same_as_first(torch.cat([k, v], dim=-1))
    # a sum of integers: the order of a racing scatter cannot matter
    return same, torch.zeros_like(same).scatter_add_(-1, same, torch.ones_like(same))


def compact(
    k: Tensor, v: Tensor, keep: Tensor | None, log_count: Tensor | None = None, *, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather the kept tokens of every head to the front and drop the rest, so that work falls.

    Args:
        k: [B, H, S, D]. v: [B, H, S, Dv].
        keep: [B, H, S] bool; None keeps all and returns the inputs.
        log_count: [B, H, S] of the tokens, if some stand for several.
        width: tokens to keep room for, at least the largest number kept; counted (one host sync) if None.

    Returns:
        k, v and log_count, S cut to `width`; the log_count of unused slots is -inf. Order is preserved.
    """
    if keep is None:
        return k, v, log_count
    counts = torch.zeros(keep.shape, device=k.device) if log_count is None else log_count.expand(keep.shape)
    if width is None:
        width = max(1, int(keep.sum(-1).max()))
    return _gather_first(k, v, keep, counts, width)


def first_to_front(keep: Tensor) -> Tensor:
    """Indices of the kept tokens in order, then those of the others: bool [..., S] -> int64 [..., S]."""
    return torch.argsort(keep.logical_not().to(torch.uint8), dim=-1, stable=True)


def _gather_first(
    k: Tensor, v: Tensor, keep: Tensor, log_count: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    order = first_to_front(keep)[..., :width]
    log_count = log_count.masked_fill(~keep, -torch.inf).gather(2, order)

    def take(x: Tensor) -> Tensor:
        return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))

    return take(k), take(v), log_count


def _same_as_first(rows: Tensor) -> Tensor:
    """Index of the first token whose row is bit-for-bit equal, [B, H, S] int64, for rows [B, H, S, D].

    Equal rows meet by sorting a 64-bit hash. Neighbours in that order are then compared in full: a hash
    collision can split a group, never join two.
    """
    bits = rows.contiguous().view(torch.int32 if rows.element_size() == 4 else torch.int16).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator).to(rows.device) * 2 + 1
    order = torch.argsort((bits * odd).sum(-1), dim=-1, stable=True)  # wraps around: exact in any order
    lined_up = bits.gather(2, order[..., None].expand_as(bits))
    joins = (lined_up[:, :, 1:] == lined_up[:, :, :-1]).all(-1)
    # a run of equal rows starts where a row does not join its predecessor; stable sorting puts its first
    # token first
    places = torch.arange(order.shape[-1], device=order.device)
    starts = torch.cat([torch.zeros_like(order[..., :1]), torch.where(joins, 0, places[1:])], dim=-1)
    first = order.gather(2, starts.cummax(dim=-1).values)
    return torch.empty_like(order).scatter_(-1, order, first)
