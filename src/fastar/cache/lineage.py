"""Which slot stands for which token, for measures: a policy reports its merges, a lineage follows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.cache.base import CacheView
from fastar.cache.merge import find_roots
from fastar.cache.slots import pack_positions

DROPPED = -1
"""Slot of a token that a cache no longer has."""


class Lineage:
    """Follows every token of a rollout through the merges of one cache; hand it to `CachePolicy.follow`.

    A token is known by its position, a slot by that of the token it is placed at. Evictions need no report: what is in
    no slot is dropped. T tokens have been committed; their order is that of commits.
    """

    def __init__(self) -> None:
        self._codes = torch.empty(0, dtype=torch.int32)  # packed positions of all tokens, ascending
        self._parents: dict[int, Tensor] = {}  # by layer: [B, H, T], the token in whose slot a token ended

    @property
    def num_tokens(self) -> int:
        return len(self._codes)

    def arrive(self, positions: Tensor) -> None:
        """Tokens at `positions` int64 [L, 3], newer than all before them, are about to be committed."""
        codes = pack_positions(positions)
        if len(self._codes) and int(codes[0]) <= int(self._codes[-1]):
            raise ValueError(
                "a lineage follows rollouts that never rewrite a frame: do not measure recall here"
            )
        self._codes = torch.cat([self._codes.to(codes.device), codes])

    def merge(self, layer: int, before: Tensor, after: Tensor, root: Tensor) -> None:
        """Slots placed at `before` ended in slots `root`, which are now placed at `after`.

        Args:
            before, after: packed positions int32 [B, H, S]; positions of no token (empty slots) are passed over.
            root: int64 [B, H, S]; B and H are 1 where videos or heads share their merges.
        """
        parents = self._parents_of(layer, root.shape[0], root.shape[1])
        token, known = self._find(before.expand_as(root))
        heir, _ = self._find(after.expand_as(root).gather(2, root))
        spare = torch.cat([parents, parents[..., :1]], 2)  # a last column that is cut off
        # a slot that stays where it is says nothing new; an emptied one still shows the place of a token that has left
        token = torch.where(known & (heir != token), token, self.num_tokens)
        self._parents[layer] = spare.scatter(2, token, heir)[..., :-1]

    def assignment(self, layer: int, view: CacheView) -> Tensor:
        """Slot of `view` that holds each token, or `DROPPED`: int64 [B, H, T]."""
        batch, heads, slots, _ = view.k.shape
        holder = torch.full((batch, heads, self.num_tokens + 1), DROPPED, device=view.k.device)
        places = view.positions if view.origins is None else view.origins
        if places is not None:
            token, known = self._find(pack_positions(places))
            if view.log_count is not None:
                known &= view.log_count > -torch.inf
            own = torch.arange(slots, device=token.device).expand_as(token)
            holder.scatter_(2, torch.where(known, token, self.num_tokens), own)
        parents = self._parents_of(layer, 1, 1)
        heirs = find_roots(parents.flatten(0, 1)).view_as(parents).expand(batch, heads, -1)
        return holder[..., :-1].gather(2, heirs)

    def _parents_of(self, layer: int, batch: int, heads: int) -> Tensor:
        """Parents in `layer`, for at least `batch` x `heads` problems, with tokens that arrived since then."""
        own = torch.arange(self.num_tokens, device=self._codes.device).expand(batch, heads, -1)
        old = self._parents.get(layer)
        if old is None:
            return own.clone()
        new = own[:1, :1, old.shape[2] :].expand(*old.shape[:2], -1)
        return torch.cat([old, new], 2)

    def _find(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the token at each packed position, and whether there is one."""
        index = torch.searchsorted(self._codes, codes.contiguous()).clamp_max(max(self.num_tokens - 1, 0))
        return index, self._codes[index] == codes


class PartOfHeads:
    """What a policy that serves some heads of one layer reports to, as its layer 0, in place of the whole `lineage`.

    All parts see the same tokens arrive: the one that `leads`, the first to commit, tells the whole.
    """

    def __init__(
        self, lineage: Lineage, layer: int, heads: Sequence[int], num_heads: int, *, leads: bool
    ) -> None:
        self.lineage, self.layer, self.heads, self.num_heads = lineage, layer, list(heads), num_heads
        self.leads = leads

    def arrive(self, positions: Tensor) -> None:
        """`Lineage.arrive`, once for all parts."""
        if self.leads:
            self.lineage.arrive(positions)

    def merge(self, layer: int, before: Tensor, after: Tensor, root: Tensor) -> None:
        """`Lineage.merge` for these heads; in the others every slot stays what it is."""
        shape = (root.shape[0], self.num_heads, root.shape[2])
        own = torch.arange(root.shape[2], device=root.device).expand(shape).clone()
        old, new = (before[:, :1].expand(shape).clone() for _ in range(2))
        own[:, self.heads], old[:, self.heads], new[:, self.heads] = root, before, after
        self.lineage.merge(self.layer, old, new, own)
