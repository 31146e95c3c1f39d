"""Evaluation clips that come back: true history up to a turning point, then the way back, with the truth
about it.

A model gets the history, generates the way back from the actions, and is scored on the pixels that were seen
in the history but not in its last 16 frames: only a memory that reaches further back can get them right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastar.data.doom.camera import HEADINGS, Action
from fastar.data.doom.dataset import clip_truth, render_clip
from fastar.data.doom.env import DoomWorlds
from fastar.data.doom.maps import Split, World, make_world
from fastar.data.doom.policy import Walk, extend, random_start, revisit, shortest_path, wander
from fastar.data.doom.truth import RECENT, first_returns, return_masks
from fastar.data.shards import shard

_WORLDS_PER_ENGINE = 8
_ATTEMPTS = 40  # ways back drawn in one world before giving up; most first ones do
_UNBOUNDED = 1 << 30  # frames: a lead that never fills up
_SEED_STRIDE = 1 << 40
_SEED_OFFSET = 1 << 39  # so that these worlds never meet those of DoomClips of the same split

WayBack = Callable[[Walk, np.random.Generator], None]


class Absence(NamedTuple):
    """How long a view may stay out of sight: at most so many frames of looking elsewhere, or rooms walked away."""

    frames: int
    rooms: int


def _linger(walk: Walk, rng: np.random.Generator, longest: int) -> None:
    """Looks a little (15 to 30 degrees) left and right for `RECENT` to `longest` frames; ends as it began."""
    until = len(walk.actions) + int(rng.integers(RECENT, longest))
    while len(walk.actions) < until and not walk.full:
        steps = int(rng.choice((-1, 1))) * int(rng.integers(2, 5))
        walk.turn(steps)
        walk.act(Action.NONE, int(rng.integers(0, 4)))
        walk.turn(-steps)


def look_away(walk: Walk, rng: np.random.Generator, absence: Absence) -> WayBack:
    """Turns 135 to 180 degrees away and lingers; the way back is the same turn undone."""
    steps = int(rng.choice((-1, 1))) * int(rng.integers(18, 25))
    walk.turn(steps)
    _linger(walk, rng, absence.frames)
    return lambda later, _: later.turn(-steps)


def turn_on(walk: Walk, rng: np.random.Generator, absence: Absence) -> WayBack:
    """Turns 135 to 180 degrees away and lingers; the way back completes the circle."""
    side, steps = int(rng.choice((-1, 1))), int(rng.integers(18, 25))
    walk.turn(side * HEADINGS)
    walk.turn(side * steps)
    _linger(walk, rng, absence.frames)
    return lambda later, _: later.turn(side * (HEADINGS - steps))


def walk_away(walk: Walk, rng: np.random.Generator, absence: Absence) -> WayBack:
    """Looks round, walks some rooms away; the way back walks home and takes the first pose again."""
    home = walk.pose
    walk.turn(int(rng.choice((-1, 1))) * HEADINGS)
    wander(walk, rng, rooms=int(rng.integers(1, absence.rooms + 1)))

    def back(later: Walk, rng: np.random.Generator) -> None:
        world = later.world
        later.follow(shortest_path(world, later.cell, world.cell_at(home.x, home.y)), rng)
        later.go_to(home.x, home.y)
        later.face(home.heading)

    return back


def carry_on(walk: Walk, rng: np.random.Generator, absence: Absence) -> WayBack:
    """Does nothing special; the way back goes to a random pose of at least 32 frames ago."""
    return revisit


KINDS: tuple[Callable[[Walk, np.random.Generator, Absence], WayBack], ...] = (
    look_away,
    turn_on,
    walk_away,
    carry_on,
)


def plan_return(
    world: World, rng: np.random.Generator, *, history: int, future: int, absence: Absence
) -> Walk:
    """A walk of `history` + `future` frames whose turning point is frame `history`."""
    lead = Walk(world, random_start(world, rng), frames=_UNBOUNDED)
    extend(lead, rng, until=history)
    back = KINDS[int(rng.integers(len(KINDS)))](lead, rng, absence)
    # The deed has its own length: keep the last `history` frames, so that it ends where the history ends.
    walk = Walk(world, lead.poses[-history], frames=history + future)
    walk.poses = lead.poses[-history:]
    walk.actions = [int(Action.NONE), *lead.actions[len(lead.actions) - history + 1 :]]
    back(walk, rng)
    extend(walk, rng, until=history + future)
    return walk


class ReturnClips(IterableDataset[dict[str, Tensor]]):
    """Clips with a turning point after `history` frames and at least `returns` returning frames in the
    `future` ones.

    A view stays out of sight for up to `longest_absence` frames of looking elsewhere, or `most_rooms` rooms of walking.
    With 32 and 3, the newest 96 of 192 frames hold 93 % of the pixels that return; with 144 and 5, about 60 %.

    An item has the keys of `DoomClips(with_truth=True)` with F = history + future, and:
        history_end:   int64 []; frames [0, history_end) are given, the rest is to be generated.
        return_frames: int64 [returns]; absolute indices of the first frames in which at least `share` of the
            pixels return.
        return_masks:  bool [returns, 96, 128]; those pixels (truth.return_mask).
    Everything is a pure function of (seed, split, index). Sharding over ranks and workers as in `DoomClips`.
    """

    def __init__(
        self,
        *,
        clips: int,
        history: int = 192,
        future: int = 48,
        seed: int = 0,
        split: Split = "heldout",
        cells: int = 5,
        recent: int = RECENT,
        share: float = 0.1,
        returns: int = 8,
        longest_absence: int = 144,
        most_rooms: int = 5,
    ) -> None:
        if longest_absence <= RECENT or most_rooms < 1:
            raise ValueError(
                f"need longest_absence > {RECENT} and most_rooms >= 1, not {longest_absence} and {most_rooms}."
            )
        if not recent < history or future < returns:
            raise ValueError(
                f"need history > recent and future >= returns, not history={history}, recent={recent}, "
                f"future={future}, returns={returns}."
            )
        self.clips, self.history, self.future, self.seed, self.split = clips, history, future, seed, split
        self.absence = Absence(longest_absence, most_rooms)
        self.cells, self.recent, self.share, self.returns = cells, recent, share, returns
        make_world(0, split=split, cells=cells)  # a wrong split or size fails here, not inside a worker

    def plan(self, index: int) -> tuple[Walk, dict[str, Tensor]]:
        """Walk and truth of clip `index`, without rendering."""
        world = make_world(
            self.seed * _SEED_STRIDE + _SEED_OFFSET + index, split=self.split, cells=self.cells
        )
        rng = np.random.default_rng([world.seed, 2, self.split == "heldout"])
        for _ in range(_ATTEMPTS):
            walk = plan_return(world, rng, history=self.history, future=self.future, absence=self.absence)
            truth = clip_truth(walk)
            masks = return_masks(
                truth["pose"],
                truth["depth"],
                history_end=self.history,
                recent=self.recent,
                share=self.share,
                enough=self.returns,
            )
            found = first_returns(masks, share=self.share, count=self.returns)
            if len(found) == self.returns:
                truth["history_end"] = torch.tensor(self.history)
                truth["return_frames"] = found + self.history
                truth["return_masks"] = masks[found]
                return walk, truth
        raise ValueError(
            f"clip {index}: no way back with {self.returns} frames of {self.share:.0%} returning pixels in "
            f"{self.future} frames ({_ATTEMPTS} tries); use a longer future or a smaller share."
        )

    def __len__(self) -> int:
        return self.clips

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, stride = shard()
        mine = range(first, self.clips, stride)
        for start in range(0, len(mine), _WORLDS_PER_ENGINE):
            batch = mine[start : start + _WORLDS_PER_ENGINE]
            plans = [self.plan(index) for index in batch]
            with DoomWorlds([walk.world for walk, _ in plans]) as engine:
                for number, (index, (walk, truth)) in enumerate(zip(batch, plans, strict=True)):
                    yield {"index": torch.tensor(index), **render_clip(engine, number, walk), **truth}
