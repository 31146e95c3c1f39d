"""The window that a published model was made with, counted in frames: the baseline `stock` of every speed-up."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.cache.base import CacheSpec, CacheView, Packing, Room, Staged
from fastar.cache.change import Change, Joined, drop_oldest
from fastar.cache.policy import SlotPolicy
from fastar.cache.slots import SlotOptions


class StockWindow(SlotPolicy):
    """What a pass attends to is `attended_frames` long: its own frames, the newest ones before them, and the sink.

    Nothing is dropped between the newest frames. A pass that is longer than the window by itself reads the sink alone.

    Args:
        attended_frames: frames that a pass attends to, its own included. Self-Forcing, CausVid: 21; LongLive: 12;
            Matrix-Game 2.0: 6.
        sink_frames: first frames of the rollout, which stay for good and are among them. LongLive, Rolling-Forcing: 3.
        move_sink: turn the sink's keys to the frames just before the window, where nothing is missing in between.
            Attention under RoPE sees differences of positions alone, so this is also LongLive's mode without end, which
            ropes its whole window from 0 in every pass.
        sink_in_commits: False leaves the sink out in passes that commit, which then read the newest frames in its place
            (Rolling-Forcing).
        slots: slot_bits, storage, quant_group, read_slots: see `SlotCache`.
    """

    def __init__(
        self,
        *,
        attended_frames: int = 21,
        sink_frames: int = 0,
        move_sink: bool = False,
        sink_in_commits: bool = True,
        **slots: Unpack[SlotOptions],
    ) -> None:
        super().__init__(**slots)
        if sink_frames < 0 or attended_frames <= sink_frames:
            raise ValueError(
                "a stock window needs sink_frames >= 0 and attended_frames above it, got "
                f"{sink_frames} and {attended_frames}"
            )
        self.attended_frames, self.sink_frames = attended_frames, sink_frames
        self.move_sink, self.sink_in_commits = move_sink, sink_in_commits
        self._reader = (0, 0, False)  # frames of the pass, its first frame, whether it leaves the sink out

    def bind(self, spec: CacheSpec) -> None:
        if self.attended_frames < spec.chunk_frames:
            raise ValueError(
                f"a window of {self.attended_frames} frames is shorter than a chunk of {spec.chunk_frames}: raise "
                "attended_frames"
            )
        super().bind(spec)
        self._reader = (spec.chunk_frames, 0, False)

    def capacity_slots(self) -> int:
        spare = 0 if self.sink_in_commits else self.sink_frames
        frames = max(self.attended_frames - self.spec.chunk_frames + spare, self.sink_frames)
        return frames * self.spec.tokens_per_frame

    def verbatim_slots(self) -> int:
        return self.capacity_slots() - self._slots(self.sink_frames)

    def absorb(
        self, layer: int, slots: Joined, arrived: int, staged: Staged, extras: dict[str, Tensor]
    ) -> Change:
        return drop_oldest(slots, self._slots(self.sink_frames), self.capacity_slots(), arrived)

    def enter(self, context: PassContext) -> bool:
        first, stop = context.pass_frames
        before = self._reader
        self._reader = (stop - first, first, context.commits and not self.sink_in_commits)
        return before != self._reader

    def view(self, layer: int) -> CacheView:
        whole = super().view(layer)
        if whole.positions is None:
            return whole
        stop, start, apart = self._reads()
        view = _cut(whole, stop, start)
        return self._moved(view, stop, apart) if apart else view

    def room(self, layer: int, tokens: int) -> Room | None:
        stop, start, apart = self._reads()
        return super().room(layer, tokens) if stop == start and not apart else None

    @property
    def packing(self) -> Packing | None:
        found = super().packing
        return (
            None if found is None else replace(found, obstacle="a stock window cuts and turns what it reads")
        )

    def _reads(self) -> tuple[int, int, int]:
        """Slots before the first number are read, and from the second on; the former as if so many frames later."""
        own, first_frame, no_sink = self._reader
        sink = min(self._slots(self.sink_frames), self.filled)
        room = self._slots(max(0, self.attended_frames - own - (0 if no_sink else self.sink_frames)))
        start = max(0 if no_sink else sink, self.filled - room)
        if no_sink:
            return 0, start, 0
        apart = first_frame - (self.filled - start + sink) // self.spec.tokens_per_frame - self.first_frame
        return sink, start, apart if self.move_sink and sink and apart > 0 else 0

    def check_drop(self, first_frame: int) -> None:
        """Any frames can be dropped: those that have left the window are simply not there."""

    def drop_from(self, first_frame: int) -> None:
        if first_frame >= self.next_frame:
            return
        tokens = self.spec.tokens_per_frame
        sink = min(self._slots(self.sink_frames), self.filled)
        newest = (self.filled - sink) // tokens  # frames
        kept = max(0, newest - (self.next_frame - first_frame))
        kept_sink = min(sink // tokens, max(0, first_frame - self.first_frame))
        self.filled = (kept_sink + kept) * tokens
        self.next_frame = first_frame
        self._staged.clear()

    def _slots(self, frames: int) -> int:
        return frames * self.spec.tokens_per_frame

    def _moved(self, view: CacheView, sink: int, frames: int) -> CacheView:
        """The sink's keys, the first slots, as if they stood `frames` later."""
        assert view.positions is not None
        # Turns add up, so that one takes a roped key on; three dimensions keep the table from being remembered.
        turn = torch.tensor([[[frames, 0, 0]]], device=view.k.device)
        k, positions = view.k.clone(), view.positions.clone()
        k[:, :, :sink] = self.spec.rope.rotate(k[:, :, :sink], turn)
        positions[:, :, :sink, 0] += frames
        return CacheView(k, view.v, view.log_count, positions, origins=view.positions)


def _cut(view: CacheView, stop: int, start: int) -> CacheView:
    """Slots before `stop` and from `start` on."""
    if stop == start:
        return view
    assert view.positions is not None and view.log_count is None
    k, v, positions = (
        torch.cat([x[:, :, :stop], x[:, :, start:]], 2) for x in (view.k, view.v, view.positions)
    )
    return CacheView(k, v, None, positions)
