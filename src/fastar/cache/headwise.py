"""One budget, spent head by head: a budgeted policy for every group of heads that get the same share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastar.cache.base import CachePolicy, CacheSpec, CacheView, Execute, Packing, Staged, StoredView, at_once
from fastar.cache.budget import Budget, BudgetedPolicy
from fastar.cache.head_errors import HeadErrors
from fastar.cache.lineage import Lineage, PartOfHeads
from fastar.cache.rows import HeadGroup, LayerRows
from fastar.cache.slots import ReadSlots

MakePolicy = Callable[..., BudgetedPolicy]


@dataclass(frozen=True)
class Part:
    """Heads of one layer that are to get `frames` frames of slots each, from a policy that `make` makes."""

    layer: int
    heads: list[int]
    frames: float
    make: MakePolicy


class HeadwiseCache(CachePolicy):
    """Splits the budget over layers and heads by what they need, then leaves each group of heads to `policy`.

    What heads need comes from `HeadErrors`, measured once for a checkpoint (experiments/calibrate.py). In a layer whose
    heads hold unequally many slots, the view is padded with empty slots (log count -inf) to the longest and says how
    many each head has (`CacheView.lengths`): engines that take lengths read no more (`fastar.attention.reading`).
    Packed slots can be read as they are stored, those of a layer in one call, if all groups have the same kind. Every
    group calls its layer 0: policies that draw lots by layer draw the same in all.

    Args:
        policy: makes the policy of a group, given `budget_bytes`.
        local_policy: the same for heads that look at their newest frames only; None for `policy` everywhere.
        local_error: a head is local if a window of its share leaves at most this error (`HeadErrors.is_local`).
        head_errors: what heads need, or the file that says so; None gives all heads the same.
        budget_share, budget_frames, budget_bytes, history_frames: of all heads together; see `Budget`.
    """

    def __init__(
        self,
        *,
        policy: MakePolicy,
        local_policy: MakePolicy | None = None,
        local_error: float = 0.004,
        head_errors: HeadErrors | str | Path | None = None,
        budget_share: float | None = None,
        budget_frames: float | None = None,
        budget_bytes: int | None = None,
        history_frames: int = 192,
    ) -> None:
        super().__init__()
        self.policy, self.local_policy, self.local_error = policy, local_policy or policy, local_error
        self.head_errors = head_errors
        self.budget = Budget(
            budget_share=budget_share,
            budget_frames=budget_frames,
            budget_bytes=budget_bytes,
            history_frames=history_frames,
        )
        self.groups: list[HeadGroup] = []
        self._rows: list[LayerRows] = []

    def bind(self, spec: CacheSpec) -> None:
        super().bind(spec)
        try:
            self.groups = self._make_groups()
        except ValueError:
            self._spec = None
            raise
        packing = self.packing
        if packing is not None and packing.obstacle is None:
            layers = range(spec.num_layers)
            self._rows = [LayerRows(list(self._of(layer)), packing.format, spec) for layer in layers]

    def total_budget(self) -> int:
        """The budget in bytes."""
        return self.budget.total(self.spec)

    # -- who gets how much ---------------------------------------------------------------------------------------

    def _make_groups(self) -> list[HeadGroup]:
        spec, budget = self.spec, self.total_budget()
        probe = self._on_paper(self.policy, 1)
        room = budget / (spec.num_layers * spec.num_heads) - probe.extras_bytes()
        frames = room / (probe.slot_bytes() * spec.tokens_per_frame)
        parts = self._divide(self._errors(), frames)
        # Slots of several heads share what they know of their place, and local ones know less: cheaper than one's.
        papers = [self._on_paper(part.make, len(part.heads)) for part in parts]
        sizes = [
            part.frames * spec.tokens_per_frame * paper.slot_bytes()
            for part, paper in zip(parts, papers, strict=True)
        ]
        scale = (budget - sum(paper.extras_bytes() for paper in papers)) / sum(sizes)
        groups = []
        for part, paper in zip(parts, papers, strict=True):
            slots = int(part.frames * scale * spec.tokens_per_frame)
            own = slots * paper.slot_bytes() + paper.extras_bytes()
            try:
                policy = part.make(budget_share=None, budget_frames=None, budget_bytes=own)
                policy.bind(self._spec_of(len(part.heads)))
            except ValueError as error:
                raise ValueError(
                    f"the cache budget of {budget} bytes, split over heads, leaves {max(0, own)} for heads "
                    f"{part.heads} of layer {part.layer}, too few: raise the budget (for these heads, {error})"
                ) from error
            groups.append(HeadGroup(part.layer, part.heads, policy))
        return groups

    def _errors(self) -> HeadErrors | None:
        """The measurements, of this many layers and heads."""
        spec, known = self.spec, self.head_errors
        errors = HeadErrors.load(known) if isinstance(known, str | Path) else known
        if errors is not None and errors.shape != (spec.num_layers, spec.num_heads):
            raise ValueError(
                f"head_errors speak of {errors.shape[0]} layers of {errors.shape[1]} heads, but the backbone has "
                f"{spec.num_layers} of {spec.num_heads}: measure them on this backbone (experiments/calibrate.py)"
            )
        return errors

    def _divide(self, errors: HeadErrors | None, mean: float) -> list[Part]:
        """Heads of a layer that get the same number of frames (`mean` on average) and the same policy."""
        spec = self.spec
        if errors is None:
            return [
                Part(layer, list(range(spec.num_heads)), mean, self.policy)
                for layer in range(spec.num_layers)
            ]
        parts = []
        for layer, row in enumerate(errors.allot(mean)):
            kinds: dict[tuple[int, bool], list[int]] = {}
            for head, frames in enumerate(row):
                local = errors.is_local(layer, head, frames, self.local_error)
                kinds.setdefault((frames, local), []).append(head)
            parts += [
                Part(layer, heads, frames, self.local_policy if local else self.policy)
                for (frames, local), heads in sorted(kinds.items())
            ]
        return parts

    def _spec_of(self, heads: int) -> CacheSpec:
        return replace(self.spec, num_layers=1, num_heads=heads, key_width=None)

    def _on_paper(self, make: MakePolicy, heads: int) -> BudgetedPolicy:
        """A policy without memory, to ask what its slots cost."""
        ample = max(self.total_budget(), 4 * self.spec.chunk_frames * self.spec.dense_frame_bytes)
        policy = make(budget_share=None, budget_frames=None, budget_bytes=ample)
        policy.bind(replace(self._spec_of(heads), device=torch.device("meta")))
        return policy

    # -- the life of a cache -------------------------------------------------------------------------------------

    def stage(self, layer: int, staged: Staged) -> None:
        for group in self._of(layer):
            q_raw, k_raw, k, v = (x[:, group.heads] for x in (staged.q_raw, staged.k_raw, staged.k, staged.v))
            q = None if staged.q is None else staged.q[:, group.heads]
            own = Staged(q_raw=q_raw, k_raw=k_raw, k=k, v=v, positions=staged.positions, q=q)
            group.policy.stage(0, own)

    def discard(self) -> None:
        for group in self.groups:
            group.policy.discard()

    def commit(self, first_frame: int, num_frames: int, execute: Execute = at_once) -> None:
        ready = [group.policy.prepare(first_frame, num_frames) for group in self.groups]
        for group, results in zip(self.groups, ready, strict=True):
            group.policy.finish(results, first_frame, num_frames)

    def view(self, layer: int) -> CacheView:
        views = [(group.heads, group.policy.view(0)) for group in self._of(layer)]
        if len(views) == 1:
            return views[0][1]
        longest = max((view for _, view in views), key=lambda view: view.k.shape[2])
        shape = (self.spec.batch, self.spec.num_heads, longest.k.shape[2])
        if longest.positions is None:
            empty = longest.k.new_zeros(*shape, self.spec.head_dim)
            return CacheView(empty, empty.clone(), None, None)
        k, v = (longest.k.new_zeros(*shape, self.spec.head_dim) for _ in range(2))
        positions = longest.positions.new_zeros(*shape, 3)
        log_count = torch.full(shape, -torch.inf, device=k.device)
        even, sizes = True, [0] * self.spec.num_heads
        for heads, view in views:
            size = view.k.shape[2]
            for head in heads:
                sizes[head] = size
            assert view.positions is not None  # all groups take in the same commits
            k[:, heads, :size], v[:, heads, :size] = view.k, view.v
            positions[:, heads, :size] = view.positions
            log_count[:, heads, :size] = 0 if view.log_count is None else view.log_count
            even &= size == shape[2] and view.log_count is None
        lengths = None
        if min(sizes) < max(sizes):
            lengths = torch.tensor([sizes] * self.spec.batch, dtype=torch.int32, device=k.device)
        return CacheView(k, v, None if even else log_count, positions, lengths=lengths)

    @property
    def uneven(self) -> bool:
        held = [{group.policy.capacity_slots() for group in self._of(n)} for n in range(self.spec.num_layers)]
        return any(len(sizes) > 1 for sizes in held)

    @property
    def packing(self) -> Packing | None:
        found = [group.policy.packing for group in self.groups]
        packings = [packing for packing in found if packing is not None]
        if not packings:
            return None
        asked = {packing.read for packing in packings}
        ways: tuple[ReadSlots, ...] = ("packed", "unpacked", "auto")
        read = next(way for way in ways if way in asked)
        alike = len(packings) == len(found) and len({packing.format for packing in packings}) == 1
        spec = self.spec
        longest = sum(max(g.policy.capacity_slots() for g in self._of(n)) for n in range(spec.num_layers))
        obstacle = None if alike else "heads have slots of different kinds"
        return Packing(packings[0].format, read, longest * spec.slot_copy_bytes, obstacle)

    def stored(self, layer: int) -> StoredView:
        if not self._rows:
            return super().stored(layer)
        return self._rows[layer].stored()

    def drop_from(self, first_frame: int) -> None:
        for group in self.groups:
            group.policy.check_drop(first_frame)
        for group in self.groups:
            group.policy.drop_from(first_frame)

    def follow(self, lineage: Lineage) -> None:
        for number, group in enumerate(self.groups):
            part = PartOfHeads(lineage, group.layer, group.heads, self.spec.num_heads, leads=number == 0)
            group.policy.follow(part)

    # -- accounting and saved state ------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        return sum(group.policy.bytes_used() for group in self.groups)

    def slots_used(self) -> int:
        slots = sum(group.policy.slots_used() * len(group.heads) for group in self.groups)
        return -(-slots // (self.spec.num_layers * self.spec.num_heads))

    def capacity_bytes(self) -> int:
        return sum(group.policy.capacity_bytes() or 0 for group in self.groups)

    def state_dict(self) -> dict[str, Any]:
        return {
            f"groups.{number}.{name}": value
            for number, group in enumerate(self.groups)
            for name, value in group.policy.state_dict().items()
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        before = self.state_dict()
        try:
            self._load(saved)
        except ValueError:
            self._load(before)
            raise

    def _load(self, saved: dict[str, Any]) -> None:
        for number, group in enumerate(self.groups):
            start = f"groups.{number}."
            own = {name.removeprefix(start): x for name, x in saved.items() if name.startswith(start)}
            group.policy.load_state_dict(own)

    def _of(self, layer: int) -> Iterator[HeadGroup]:
        return (group for group in self.groups if group.layer == layer)
