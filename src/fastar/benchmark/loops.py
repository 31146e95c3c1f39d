"""The mode `loops`: every method on every sampling loop for a few chunks: whether it runs, how fast, in what memory.

Weights are random, and so are noise, prompt, image and actions; the video runs free, from its first frame to its last.
Nothing runs before it is timed: the first chunk, which compiles, is told apart, and the median chunk knows nothing of
what is compiled later, for a cache that is full or a plan that is sparse.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fastar.backbones import ImageCondition, Prompts
from fastar.backbones.wan.actions import action_windows
from fastar.backbones.wan.fused import Execution
from fastar.benchmark.contents import random_prompts
from fastar.benchmark.course import taken
from fastar.benchmark.page import Page, Rows
from fastar.benchmark.timing import matmul_flops
from fastar.benchmark.workload import Variant, execution_of, variants_of
from fastar.cache.base import check_choice
from fastar.compare.session import RANDOM, Session, open_session
from fastar.metrics.efficiency import PassTimer, PeakMemory, rates
from fastar.results.logtail import reason_of
from fastar.rollout.method import start_rollout
from fastar.rollout.rollout import NonFiniteError, Rollout

IMAGE_TOKENS = 257  # of CLIP ViT-H
# out of memory, a method that needs a prompt, a package that is missing
FAILURES = (RuntimeError, ValueError, ImportError, InstantiationException)


@dataclass(frozen=True)
class Given:
    """What a video is told, at random: of everything that the backbone reads and nothing else."""

    prompts: Prompts | None
    image: ImageCondition | None
    actions: Tensor | None

    @classmethod
    def of(cls, session: Session, frames: int, seed: int) -> Given:
        """For a video of so many latent frames."""
        config, sizes = session.backbone.config, session.backbone.config.transformer
        generator = torch.Generator().manual_seed(seed)
        image, actions = None, None
        if sizes.image_dim is not None:
            tokens = torch.randn(1, IMAGE_TOKENS, sizes.image_dim, generator=generator)
            latents = torch.randn(1, frames, *config.latent_shape, generator=generator)
            image = ImageCondition.of_first_frame(tokens.to(session.device), latents.to(session.device))
        if (module := sizes.action_module) is not None:
            pixels = 1 + module.pixel_frames * (frames - 1)
            keys = torch.randint(2, (1, pixels, module.keyboard_dim), generator=generator).float()
            mouse = (
                torch.randn(1, pixels, module.mouse_dim, generator=generator) if module.mouse_dim else None
            )
            actions = action_windows(module, keyboard=keys, mouse=mouse, num_frames=frames)
        elif sizes.num_actions is not None:
            actions = torch.randint(sizes.num_actions, (1, frames), generator=generator)
        return cls(random_prompts(session, seed), image, actions)


def run_loops(config: DictConfig, page: Page) -> tuple[Rows, dict[str, Rows]]:
    """The mode `loops`: rows backbone, loop, steps, method, budget, and what was measured or the reason why nothing.

    Of the chunks after the first: `fps` is video frames a second of denoising and commits, `fps_end_to_end` of wall
    time, `fps_median` that of the median chunk. Bytes that were allocated at most count the weights. `finite` says
    whether the latents stayed so.

    Raises:
        ValueError: a loop that is not in conf/rollout, or no method.
    """
    for name in config.loops:
        check_choice("loop", name, tuple(config.rollouts))
    session = open_session(config)
    backbone = session.backbone.config
    execution = _execution(config, session)
    execution.apply(session.backbone.transformer)
    chunk = backbone.chunk_frames
    frames = chunk * -(-config.loop_frames // chunk)
    given = Given.of(session, frames, config.seed)
    measured = matmul_flops(page.device, page.dtype, size=config.matmul_size, repeats=config.repeats) / 1e12
    weights = "random" if config.checkpoint == RANDOM else session.weights[:8]
    page.card(
        {"backbone": backbone.name, "weights": weights, "latent_frames": frames, "matmul_tflops": measured},
        f"{backbone.name}, {weights} weights, {frames} latent frames in chunks of {chunk} = "
        f"{chunk * backbone.tokens_per_frame} tokens, passes {execution}. Alone: products of {config.matmul_size} x "
        f"{config.matmul_size} matrices {measured:.3g} TFLOP/s.",
    )
    named = {
        "backbone": backbone.name,
        "weights": weights,
        "execution": str(execution),
        "latent_frames": frames,
    }
    rows: Rows = []
    with _few_to_collect():
        for loop, looped, variant in _pairs(config, session):
            row = named | {"loop": loop, "steps": len(looped.loop.timesteps)}
            row |= {"method": variant.name, "budget": variant.budget}
            row |= _measured(looped, variant, given, frames, config)
            rows.append(row)
            page.say(f"{loop}, {variant.label}: " + (row["reason"] or f"{row['fps']:.4g} frames/s"))
            page.keep(rows, {})
    page.show([_text(row) for row in rows], f"{frames} latent frames on {backbone.name}, {weights} weights")
    return rows, {}


@contextmanager
def _few_to_collect() -> Iterator[None]:
    """Before each method what the last one left is collected: half a second, if all that was imported is looked at."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pairs(config: DictConfig, session: Session) -> Iterator[tuple[str, Session, Variant]]:
    """Every loop with every method, which may take its window from it."""
    for name in config.loops:
        own = copy.deepcopy(config)
        own.rollout, own.budgets = own.rollouts[name], [config.loop_budget]
        loop = instantiate(own.rollout, chunk_frames=session.backbone.config.chunk_frames)
        for variant in variants_of(own):
            yield name, replace(session, loop=loop), variant


def _execution(config: DictConfig, session: Session) -> Execution:
    """As the config says; fused null: where there is a GPU, and passes that can be."""
    if config.execution.fused is None and session.backbone.config.transformer.action_module is not None:
        return Execution()
    return execution_of(config.execution, session.device)


def _measured(
    session: Session, variant: Variant, given: Given, frames: int, config: DictConfig
) -> dict[str, Any]:
    """The row of one video."""
    taken(session.device)  # of the method before
    memory = PeakMemory(session.device)
    memory.start()
    row: dict[str, Any] = {"finite": None, "reason": None}
    try:
        rollout, captured = _start(session, variant, given, frames, config.capture)
        row |= {"engine": rollout.state.engine, "captured": captured, **rollout.state.reading.record}
        timer = _run(rollout, session, given, frames, config.video_stride)
        first, *later = timer.chunks
        speed = rates(later or [first])
        cache = rollout.state.cache
        return row | {
            "finite": True,
            "fps": speed.commit,
            "fps_median": first.frames / speed.latency_p50,
            "fps_end_to_end": speed.end_to_end,
            "chunks": len(later),
            "first_chunk_s": first.wall,
            "wall_s": sum(chunk.wall for chunk in timer.chunks),
            **memory.rows(),
            "cache_bytes": cache.bytes_used(),
            "cache_slots": cache.slots_used(),
        }
    except NonFiniteError as error:
        return row | {"finite": False, "reason": reason_of(error)}
    except FAILURES as error:
        return row | {"reason": reason_of(error)}


def _start(
    session: Session, variant: Variant, given: Given, frames: int, capture: bool | None
) -> tuple[Rollout, bool]:
    """A rollout, and whether its passes are captured: if that is asked for and the method can be."""
    shared: dict[str, Any] = {
        "loop": session.loop, "seeds": [0], "prompts": given.prompts, "image": given.image, "end_frame": frames,
    }  # fmt: skip
    if capture:
        try:
            return start_rollout(session.backbone, variant.method, **shared, capture=True), True
        except ValueError as error:
            if "cannot be captured" not in str(error):
                raise
    return start_rollout(session.backbone, variant.method, **shared), False


def _run(rollout: Rollout, session: Session, given: Given, frames: int, stride: int) -> PassTimer:
    """The whole video, chunk by chunk."""
    rollout.timer = timer = PassTimer(session.device, warmup=0)
    for first in range(0, frames, session.chunk):
        actions = None if given.actions is None else given.actions[:, session.needed(first)]
        with timer.chunk(frames=stride * session.chunk):
            rollout.step(actions)
    return timer


def _text(row: dict[str, Any]) -> dict[str, str]:
    budget = "–" if row["budget"] is None else f"{row['budget']:g}"
    named = {"loop": row["loop"], "method": row["method"], "budget": budget}
    if row["reason"] is not None:
        return named | {"fps": "–", "note": row["reason"]}
    return named | {
        "engine": row["engine"] + (", captured" if row["captured"] else ""),
        "fps": f"{row['fps']:.4g}",
        "of the median chunk": f"{row['fps_median']:.4g}",
        "first chunk s": f"{row['first_chunk_s']:.3g}",
        "peak GiB": f"{row['peak_allocated'] / 2**30:.4g}",
        "cache GiB": f"{row['cache_bytes'] / 2**30:.3f}",
    }
