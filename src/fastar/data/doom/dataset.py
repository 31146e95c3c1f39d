"""Endless clips of fresh Doom worlds, rendered where they are used: one engine process per loader worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastar.data.doom.camera import EYE, HEIGHT, WIDTH
from fastar.data.doom.env import DoomWorlds
from fastar.data.doom.maps import Split, World, make_world
from fastar.data.doom.policy import Walk, plan_clip
from fastar.data.doom.raycast import Raycaster
from fastar.data.shards import own_numbers

_WORLDS_PER_ENGINE = 32  # an engine start costs 0.2 s, entering a further world of the same file 5 ms
_SEED_STRIDE = 1 << 40  # worlds of different dataset seeds never meet


class DoomClips(IterableDataset[dict[str, Tensor]]):
    """Clips of `frames` frames, each in a world of its own.

    An item is a dict:
        frames:  uint8 [F, 96, 128, 3], RGB.
        actions: int64 [F]; action f led to frame f, action 0 is NONE. Values: `camera.Action`.
        index:   int64 []; the number of the clip. (seed, split, index) fixes every bit of it.
        pose:    float32 [F, 4], only `with_truth`: x, y, z of the eye in map units, heading in degrees.
        depth:   float16 [F, 96, 128], only `with_truth`: distance along the view axis, map units
            (raycast.py).

    Clip number i belongs to shard i mod (ranks x loader workers), so ranks and workers never repeat each
    other (fastar/data/shards.py). `clips` ends the dataset after that many clips (all shards together); the first is
    number `first_index`. `numbered` gives chosen clips.
    """

    def __init__(
        self,
        *,
        frames: int = 192,
        seed: int = 0,
        split: Split = "train",
        clips: int | None = None,
        first_index: int = 0,
        cells: int = 5,
        with_truth: bool = False,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames must be at least 1, not {frames}.")
        self.frames, self.seed, self.split, self.cells = frames, seed, split, cells
        self.clips, self.first_index, self.with_truth = clips, first_index, with_truth
        make_world(0, split=split, cells=cells)  # a wrong split or size fails here, not inside a worker

    def plan(self, index: int) -> tuple[World, Walk]:
        """World and walk of clip `index`, without rendering."""
        world = make_world(self.seed * _SEED_STRIDE + index, split=self.split, cells=self.cells)
        rng = np.random.default_rng([world.seed, 1, self.split == "heldout"])
        return world, plan_clip(world, self.frames, rng)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.numbered(own_numbers(self.first_index, self.clips))

    def numbered(self, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """The clips of these numbers, in this order, whatever the shard."""
        numbers = iter(numbers)
        while batch := list(islice(numbers, _WORLDS_PER_ENGINE)):
            plans = [self.plan(i) for i in batch]
            with DoomWorlds([world for world, _ in plans]) as engine:
                for place, (i, (_, walk)) in enumerate(zip(batch, plans, strict=True)):
                    truth = clip_truth(walk) if self.with_truth else {}
                    yield {"index": torch.tensor(i), **render_clip(engine, place, walk), **truth}


def render_clip(engine: DoomWorlds, number: int, walk: Walk) -> dict[str, Tensor]:
    """Renders a planned walk in world `number` of an engine; keys as in `DoomClips` without index."""
    frames = np.empty((len(walk.poses), HEIGHT, WIDTH, 3), np.uint8)
    for f, pose in enumerate(walk.poses):
        view = engine.enter(number, pose) if f == 0 else engine.show(pose)
        frames[f] = view.image
    return {"frames": torch.from_numpy(frames), "actions": torch.tensor(walk.actions)}


def clip_truth(walk: Walk) -> dict[str, Tensor]:
    """pose and depth of a planned walk, as in `DoomClips`; needs no engine."""
    caster = Raycaster(walk.world)
    depth = np.stack([caster.depth(pose) for pose in walk.poses]).astype(np.float16)
    pose = torch.tensor([(pose.x, pose.y, EYE, pose.degrees) for pose in walk.poses], dtype=torch.float32)
    return {"pose": pose, "depth": torch.from_numpy(depth)}
