"""The loops of conf/rollout on a small backbone, for tests of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.backbones import Backbone, Prompts
from fastar.cache import CachePolicy, DenseCache, StockWindow
from fastar.rollout.loops import ChunkLoop
from fastar.rollout.method import Method, start_rollout
from fastar.rollout.rollout import Rollout
from tests.small import ACTIONS, configs, make

CHUNK, WIDTH = 3, 8
CONFIGS = {name: config for name, config in configs("rollout").items() if name != "few_step"}
SHORTER = {
    "diffusion_forcing": {"timesteps": {"num_steps": 6}, "stagger": 2, "window": {"attended_frames": 15}}
}
"""Thirty steps are many for a test: six, of which a chunk makes two before the next one is begun."""

LOOPS: dict[str, Any] = {
    name: make(config, chunk_frames=CHUNK, **SHORTER.get(name, {})) for name, config in CONFIGS.items()
}
STAGGERED = [name for name, loop in LOOPS.items() if loop.most_in_flight > 1]


def exact() -> DenseCache:
    return DenseCache(storage="float32")


def stock(loop: ChunkLoop) -> StockWindow:
    assert loop.window is not None
    return StockWindow(storage="float32", **loop.window)


def prompts() -> Prompts:
    return Prompts(torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(0)), torch.tensor([7]))


def started(
    backbone: Backbone,
    loop: ChunkLoop,
    cache: Callable[[], CachePolicy] = exact,
    *,
    end_frame: int | None = None,
    seeds: Sequence[int] = (5,),
    recorders: Any = (),
    **method: Any,
) -> Rollout:
    given = prompts() if backbone.config.transformer.text_dim else None
    return start_rollout(
        backbone, Method(name="test", cache=cache, **method), loop=loop, seeds=seeds, prompts=given,
        recorders=recorders, end_frame=end_frame,
    )  # fmt: skip


def actions(frames: int) -> Tensor:
    return torch.randint(ACTIONS, (1, frames), generator=torch.Generator().manual_seed(1))


def generated(rollout: Rollout, frames: int) -> Tensor:
    """The video from where the rollout stands to frame `frames`, where it ends."""
    first = rollout.next_frame
    told = actions(frames)[:, first:].expand(len(rollout.seeds), -1)
    return torch.cat(list(rollout.generate(frames - first, told)), dim=1)


class Passes:
    """What every pass covered: kind, first frame, frames, and the steps of its chunks."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, tuple[int, ...]]] = []
        self._steps: list[int] = []

    def on_attend(self, event: AttendEvent) -> None:
        if event.layer or event.stream != "self":
            return
        context, (first, stop) = event.context, event.context.pass_frames
        self._steps.append(context.step)
        if context.first_frame + context.num_frames == stop:
            self.seen.append((context.kind.value, first, stop - first, tuple(self._steps)))
            self._steps = []
