"""What a commit makes of one layer's slots: worked out aside, then done in place without a copy of the cache.

The first half of a commit (`SlotPolicy.prepare`) makes a `Change` of every layer, and of that an `Edit`: indices, and
the few rows that are new. Only the second half (`SlotPolicy.finish`) writes, and it allocates nothing, so that it
cannot run out of memory halfway through the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastar.cache.slots import Slots, take

_SCRATCH_BYTES = 2**26  # most that is moved at a time


class Joined(Slots):
    """Old slots, then those that arrived, as one sequence; a field is copied together only when it is read."""

    def __init__(self, old: Slots, new: Slots) -> None:
        self.old, self.new = old, new
        self.fields = _JoinedFields(old.fields, new.fields)

    @property
    def size(self) -> int:
        return self.old.size + self.new.size

    def narrow(self, start: int, stop: int) -> Slots:
        split = self.old.size
        if stop <= split:
            return self.old.narrow(start, stop)
        if start >= split:
            return self.new.narrow(start - split, stop - split)
        return Joined(self.old.narrow(start, split), self.new.narrow(0, stop - split))


class _JoinedFields(Mapping[str, Tensor]):
    def __init__(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        self.old, self.new = old, new

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([self.old[name], self.new[name]], 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self.old)

    def __len__(self) -> int:
        return len(self.old)


@dataclass
class Change:
    """Of the slots `slots`, some are written, then some are left out.

    Attributes:
        slots: old ones, then arrivals; all indices are into these.
        keep: int64 [B or 1, H or 1, K] ascending, the slots from `first` on that stay; None for all.
        first: slots before this one stay.
        place: int64 [B or 1, H or 1, R], different slots whose fields named in `rows` are written; None for none.
        rows: fields [B or 1, H or 1, R, ...].
        whole: fields of all slots that stay, already without those left out.
        arrivals_stay: whether none of the arrivals is left out or written.
        drop: in place of `keep`, so many slots from `first` on leave.
    """

    slots: Joined
    keep: Tensor | None = None
    first: int = 0
    place: Tensor | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    arrivals_stay: bool = True
    drop: int = 0

    @property
    def size(self) -> int:
        """Slots that stay."""
        return self.slots.size - self.drop if self.keep is None else self.first + self.keep.shape[2]

    def done(self) -> Slots:
        """The slots that stay, copied."""
        fields = {}
        for name in self.slots.fields:
            if name in self.whole:
                fields[name] = self.whole[name]
                continue
            tensor = self.slots[name]
            if name in self.rows and self.place is not None:
                _rows(tensor).index_copy_(
                    0, _flat(self.place, tensor).flatten(), self.rows[name].flatten(0, 2)
                )
            if self.keep is not None:
                tensor = torch.cat([tensor[:, :, : self.first], take(tensor, self.keep)], 2)
            elif self.drop:
                tensor = torch.cat([tensor[:, :, : self.first], tensor[:, :, self.first + self.drop :]], 2)
            fields[name] = tensor
        return Slots(fields)


def drop_oldest(slots: Joined, sink: int, capacity: int, arrived: int) -> Change:
    """Keep the first `sink` slots and the newest ones, `capacity` in all."""
    surplus = max(0, slots.size - capacity)
    stay = arrived <= capacity - sink and surplus <= slots.old.size - min(sink, slots.old.size)
    return Change(slots, first=min(sink, slots.size), drop=surplus, arrivals_stay=stay)


class Scratch:
    """Memory that slots pass through on their way, shared by all layers and fields of a commit."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def reserve(self, size: int, device: torch.device) -> None:
        if self._bytes is None or self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, device=device)

    def rows(self, count: int, like: Tensor) -> Tensor:
        """Room for `count` rows of `like` [rows, ...]."""
        assert self._bytes is not None
        shape = (count, *like.shape[1:])
        size = like.element_size() * torch.Size(shape).numel()
        return self._bytes[:size].view(like.dtype).view(shape)


@dataclass
class _Move:
    """Slots [start, stop) of one tensor are to become those at `source`, flat rows."""

    start: int
    stop: int
    source: Tensor


class Edit:
    """A `Change` of the first slots of `buffer`, with all that `apply` needs computed and allocated.

    Slots only ever move towards the front, and in that order, so that none is overwritten before it has moved.
    """

    def __init__(self, change: Change, buffer: Slots, scratch: Scratch) -> None:
        assert change.arrivals_stay and change.size <= buffer.size and not (change.drop and change.rows)
        self.size, self._change, self._scratch = change.size, change, scratch
        self._places: dict[str, Tensor] = {}  # by field: rows that are written
        self._moves: dict[str, list[_Move]] = {}  # by field: what moves, in order
        keep, arrived = change.keep, change.slots.new.size
        self._new = self._arrivals(change, buffer)
        known: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]] = {}
        for name, tensor in buffer.fields.items():
            lead = tuple(tensor.shape[:2])
            if lead not in known:  # fields of the same leading sizes share their indices
                moving = None if keep is None else _flat(keep[:, :, : keep.shape[2] - arrived], tensor)
                known[lead] = (None if change.place is None else _flat(change.place, tensor), moving)
            place, moving = known[lead]
            if place is not None and name in change.rows:
                self._places[name] = place.flatten()
            if moving is not None and name not in change.whole:
                self._moves[name] = list(self._plan(moving, tensor))

    @staticmethod
    def _arrivals(change: Change, buffer: Slots) -> Slots:
        """Fields of arrivals that are to be written; copied, where they lie behind the slots and their place begins.

        That is the case in the commit that fills a buffer up: later ones move them by their own length.
        """
        old, arrived = change.slots.old.size, change.slots.new.size
        overlapping = old < change.size < old + arrived
        fields = {name: x for name, x in change.slots.new.fields.items() if name not in change.whole}
        behind = [name for name in fields if _shares_memory(fields[name], buffer[name])]
        return Slots(fields | {name: fields[name].clone() for name in behind if overlapping})

    def _plan(self, source: Tensor, tensor: Tensor) -> Iterator[_Move]:
        """Slots from the change's first on come from rows `source` [B, H, K], a stretch at a time."""
        slot_bytes = tensor[:, :, :1].numel() * tensor.element_size()
        step, first, count = max(1, _SCRATCH_BYTES // slot_bytes), self._change.first, source.shape[2]
        self._scratch.reserve(min(step, count) * slot_bytes, tensor.device)
        for start in range(0, count, step):
            part = source[:, :, start : start + step]
            yield _Move(first + start, first + start + part.shape[2], part.flatten())

    def apply(self, buffer: Slots) -> None:
        """Do it, in place."""
        change = self._change
        for name, place in self._places.items():
            _rows(buffer[name]).index_copy_(0, place, change.rows[name].flatten(0, 2))
        for name, moves in self._moves.items():
            tensor = buffer[name]
            rows = _rows(tensor)
            for move in moves:
                passing = self._scratch.rows(len(move.source), rows)
                torch.index_select(rows, 0, move.source, out=passing)
                target = tensor[:, :, move.start : move.stop]
                target.copy_(passing.view(target.shape))
        for name, tensor in buffer.fields.items():
            if change.drop and name not in change.whole:
                close_gap(tensor, change.first, change.drop, change.slots.old.size)
        for name, tensor in change.whole.items():
            buffer[name][:, :, : self.size] = tensor
        Slots({name: buffer[name] for name in self._new.fields}).write(self.size - self._new.size, self._new)


Prepared = list[tuple[Slots | Edit, dict[str, Tensor]]]
"""By layer, or by so many layers at a time as make the list come out: slots, or what is to be done to them in place,
and extras after a commit that has not happened yet, those of several layers one after the other."""


def close_gap(tensor: Tensor, first: int, gap: int, stop: int) -> None:
    """Move slots first + gap .. stop - 1 of tensor [B, H, S, ...] to `first`, `gap` at a time: none overlaps."""
    for start in range(first + gap, stop, gap):
        end = min(start + gap, stop)
        tensor[:, :, start - gap : end - gap] = tensor[:, :, start:end]


def _shares_memory(x: Tensor, other: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _rows(tensor: Tensor) -> Tensor:
    """tensor [B, H, S, ...], slots equally far apart, as [B * H * S, ...], sharing memory."""
    return tensor.view(-1, *tensor.shape[3:])


def _flat(index: Tensor, tensor: Tensor) -> Tensor:
    """Slots `index` [B or 1, H or 1, K] of tensor [B, H, S, ...] as rows of `_rows(tensor)`: int64 [B, H, K]."""
    batch, heads, size = tensor.shape[:3]
    problems = torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
    return index + problems * size
