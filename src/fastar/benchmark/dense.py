"""The mode `dense`: the unbounded cache at lengths that fit no card, one layer's cache read by all layers.

A dense cache of 3,000 video frames of Wan2.1-1.3B takes 193 GiB. How long a pass takes does not depend on whose keys
are read: here all layers read one buffer, which holds the keys and values that a layer of this shape makes of recorded
motion, and write the current chunk into it. Every pass computes what a pass of dense computes and moves as many bytes.
Commits are passes; what they write is already there.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from fastar import engines
from fastar.attention.context import Stream
from fastar.attention.place import Placement
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.backbones import Backbone
from fastar.backbones.wan.transformer import ProjectedTokens
from fastar.benchmark.ceiling import Ceiling, show_card
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import timed
from fastar.benchmark.workload import Workload, open_workload
from fastar.compare.weights import random_backbone
from fastar.rollout.capture import Graphs

MARK = "one layer's cache reused by all layers"


class SharedCache:
    """Keys and values of one layer, which every layer attends to: `attend` is what a backbone calls.

    Args:
        rope, grid: the backbone's.
        engine: which executes attention.
    """

    def __init__(self, rope: RotaryEmbedding, grid: tuple[int, int], engine: str) -> None:
        self.rope, self.grid, self.engine = rope, grid, engine
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []
        self._keep = False
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._turns = rope.tables(torch.empty(0, 3, dtype=torch.long))

    def begin(self, first_frame: int, frames: int, device: torch.device, *, keep: bool = False) -> None:
        """The next pass is over `frames` frames from `first_frame` on; with `keep` its keys are added to the past."""
        self._turns, self._keep = (
            self.rope.tables(grid_positions(first_frame, frames, self.grid, device)),
            keep,
        )

    def hold(self, frames: int) -> None:
        """Attend to the first `frames` of the frames that were kept, and to the current ones."""
        tokens = self.grid[0] * self.grid[1]
        chunk = self._k[0].shape[2]
        self._buffer = None  # before the next is made: two of them may not fit
        shape = (*self._k[0].shape[:2], frames * tokens + chunk, self._k[0].shape[3])
        buffers = self._k[0].new_empty(shape), self._v[0].new_empty(shape)
        for buffer, parts in zip(buffers, (self._k, self._v), strict=True):
            for number, part in enumerate(parts[: frames * tokens // chunk]):
                buffer[:, :, number * chunk : (number + 1) * chunk] = part
        self._buffer = buffers

    def attend(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `fastar.attention.state.AttentionState.attend`."""
        if stream == "self":
            tokens, turned = k.shape[2], q.new_empty(q.shape)
            if self._buffer is None or self._keep:
                held_k, held_v = k.new_empty(k.shape), v.new_empty(v.shape)
            else:
                held_k, held_v = self._buffer
            current_k, current_v = held_k[:, :, -tokens:], held_v[:, :, -tokens:]
            Placement(q, k, v, self._turns, turned, current_k, current_v).run()
            if self._keep:
                self._k.append(held_k)
                self._v.append(held_v)
            q, k, v = turned, held_k, held_v
        return engines.attend(q, k, v, engine=self.engine)[0]


def run_dense(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `dense`; see `dense_rows`."""
    workload = open_workload(config, page, latent_frames=needed_frames(config))
    return dense_rows(workload, show_card(workload, config, page), config, page), {}


def needed_frames(config: DictConfig) -> int:
    """Latent frames of the recording that `dense_rows` reads."""
    return int(max(config.dense.latent_frames) + config.backbone.chunk_frames)


def dense_rows(workload: Workload, ceiling: Ceiling, config: DictConfig, page: Page) -> Rows:
    """Rows latent_frames (cached), pass_ms, cache_gib (of all layers, were each its own), note; shown as a table, too.

    The last row has the rate over `dense.video_frames` frames, by linear interpolation between the measured lengths.
    """
    cache = _filled(workload, config, ceiling.engine, max(config.dense.latent_frames))
    rows: Rows = []
    for frames in sorted({0, *config.dense.latent_frames}):
        row = {
            "method": "dense, shared",
            "latent_frames": frames,
            "cache_gib": _dense_gib(workload, frames),
            "layers": workload.layers,
            "engine": ceiling.engine,
            "captured": workload.capture,
            "execution": str(workload.execution),
            "note": MARK,
            "reason": None,
        }
        try:
            rows.append(row | _pass(workload, cache, frames, config))
        except RuntimeError as error:  # out of memory
            rows.append(row | {"reason": str(error).split("\n")[0]})
    rows.append(_whole(rows, workload, config.dense.video_frames))
    page.show([_text(row) for row in rows], f"dense, {MARK}")
    return rows


def _filled(workload: Workload, config: DictConfig, engine: str, frames: int) -> SharedCache:
    """A cache with `frames` latent frames of the recording, by one random layer of the backbone's shape."""
    one = copy.deepcopy(config.backbone)
    one.transformer.num_layers = 1
    layer = random_backbone(one, workload.device)
    weight = workload.session.backbone.transformer.patch_embedding.weight
    layer.transformer.to(workload.device, weight.dtype)
    cache = SharedCache(layer.transformer.rope, _grid(workload), engine)
    chunk, text = workload.session.chunk, _text_of(layer, workload)
    for first in range(0, frames, chunk):
        latents = workload.motion.chunk(first, chunk, workload.device)
        cache.begin(first, chunk, workload.device, keep=True)
        _forward(layer, latents, text, cache, level=0.0)
    return cache


@torch.inference_mode()
def _text_of(backbone: Backbone, workload: Workload) -> ProjectedTokens | None:
    """Keys and values of the prompt, projected once a rollout."""
    if workload.contents.prompts is None:
        return None
    transformer = backbone.transformer
    return transformer.project_text(
        workload.contents.prompts.text(workload.device, transformer.patch_embedding.weight.dtype)
    )


@torch.inference_mode()
def _forward(
    backbone: Backbone, latents: Tensor, text: ProjectedTokens | None, cache: SharedCache, level: float
) -> None:
    transformer, device = backbone.transformer, latents.device
    actions, poses = None, None
    if backbone.config.transformer.num_actions is not None:
        actions = torch.zeros(latents.shape[:2], dtype=torch.long, device=device)
    if transformer.odometer is not None and actions is not None:
        poses = transformer.odometer.advance(transformer.odometer.start(len(latents), device), actions)
    timesteps = torch.full(latents.shape[:2], level, device=device)
    transformer(latents, timesteps, attend=cache.attend, actions=actions, poses=poses, text=text)


def _pass(workload: Workload, cache: SharedCache, frames: int, config: DictConfig) -> dict[str, Any]:
    """Time a pass of all layers on `frames` cached latent frames."""
    chunk = workload.session.chunk
    latents = workload.motion.chunk(frames, chunk, workload.device)
    cache.hold(frames)
    cache.begin(frames, chunk, workload.device)
    backbone = workload.session.backbone
    text = _text_of(backbone, workload)

    def forward() -> None:
        _forward(backbone, latents, text, cache, level=1000.0)

    call = forward
    if workload.capture and backbone.config.transformer.num_actions is None:
        graphs = Graphs(workload.device)  # this length's alone: their memory goes with them
        call = partial(graphs.run, "pass", forward)
    # the second call captures
    time = timed(call, device=workload.device, repeats=config.dense.repeats, warmup=2)
    return {"pass_ms": 1e3 * time.median, "pass_ms_low": 1e3 * time.low, "pass_ms_high": 1e3 * time.high}


def _whole(rows: Rows, workload: Workload, video_frames: int) -> dict[str, Any]:
    """The rate over the first `video_frames`: every chunk's passes at the length that is cached then."""
    measured = [row for row in rows if row["reason"] is None]
    lengths, times = ([float(row[name]) for row in measured] for name in ("latent_frames", "pass_ms"))
    chunk, passes = workload.session.chunk, workload.session.loop.passes_per_chunk
    starts = np.arange(0, video_frames // workload.stride, chunk)
    row: dict[str, Any] = {
        "method": "dense, shared",
        "over_video_frames": video_frames,
        "to_latent_frame": video_frames // workload.stride,
        "layers": workload.layers,
        "note": f"{MARK}; interpolated",
    }
    if not lengths or starts[-1] > max(lengths):
        return row | {"reason": f"no pass was measured at {starts[-1]} latent frames or beyond"}
    seconds = passes * float(np.interp(starts, lengths, times).sum()) / 1000
    return row | {"reason": None, "seconds": seconds, "fps": video_frames / seconds}


def _grid(workload: Workload) -> tuple[int, int]:
    backbone = workload.session.backbone.config
    _, rows, columns = backbone.latent_shape
    return rows // backbone.transformer.patch, columns // backbone.transformer.patch


def _dense_gib(workload: Workload, frames: int) -> float:
    sizes = workload.session.backbone.config.transformer
    tokens = workload.session.backbone.config.tokens_per_frame
    return 2 * 2 * sizes.num_layers * sizes.dim * tokens * frames / 2**30


def _text(row: dict[str, Any]) -> dict[str, str]:
    if "over_video_frames" in row:
        named = {"latent frames": f"0 to {row['to_latent_frame']}", "note": row["note"]}
        return named | {"fps": row["reason"] or f"{row['fps']:.4g}"}
    named = {"latent frames": str(row["latent_frames"]), "cache GiB, all layers": f"{row['cache_gib']:.1f}"}
    if row["reason"] is not None:
        return named | {"note": row["reason"]}
    return named | {
        "pass ms": f"{row['pass_ms']:.4g} [{row['pass_ms_low']:.4g}, {row['pass_ms_high']:.4g}]",
        "note": row["note"],
    }
