"""Steps along the flow that look back on those before them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

SOLVERS = ("euler", "unipc")


def unipc_step(
    timesteps: Sequence[float], step: int, latents: Tensor, velocity: Tensor, past: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of UniPC (arXiv 2302.04867; order 2, B2, on predictions of the clean chunk), by diffusers' scheduler.

    The scheduler keeps what it remembers of one sample to itself. Here every chunk in flight is such a sample, so that
    this is taken out of it after each step and put back before the next.

    Args:
        timesteps: noise levels of all steps, 1000 first.
        step: the one to make.
        latents: [B, n, C, h, w] at its level; velocity: there.
        past: what the step before returned; nothing for the first one.

    Returns:
        The latents at the next level, clean after the last, and what the next step looks back on: the latents that this
        one was made from, then the clean chunks that it and the one before it predicted, newest last.

    Raises:
        ValueError: diffusers is missing.
    """
    scheduler = copy.copy(_scheduler(tuple(timesteps)))
    order = scheduler.config.solver_order
    before, predicted = (past[0], list(past[1:])) if past else (None, [])
    scheduler._step_index = step
    scheduler.model_outputs = [None] * (order - len(predicted)) + predicted
    scheduler.timestep_list = [None] * order
    scheduler.last_sample = before
    scheduler.lower_order_nums = min(step, order)
    # of the step before, which is corrected now
    scheduler.this_order = min(step, order, len(timesteps) - step + 1)
    moved = scheduler.step(velocity, scheduler.timesteps[step], latents, return_dict=False)[0]
    known = [output for output in scheduler.model_outputs if output is not None]
    return moved, (scheduler.last_sample, *known)


@lru_cache(maxsize=4)
def _scheduler(timesteps: tuple[float, ...]) -> Any:
    try:
        from diffusers import UniPCMultistepScheduler
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"rollout.solver=unipc is diffusers' UniPCMultistepScheduler ({reason}): pip install -e '.[wan]', or set "
            "rollout.solver=euler"
        ) from error
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(timesteps) / 1000)
    return scheduler
