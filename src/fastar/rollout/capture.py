"""CUDA graphs of what a rollout does again and again, so that the host launches each once and waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.state import AttentionState
from fastar.backbones.wan.transformer import CausalWanTransformer, ProjectedTokens
from fastar.cache.base import Staged

Result = TypeVar("Result")

RequireFinite = Callable[[Tensor, str], None]
"""Raises if a bool tensor is False, in a pass of that name."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: object  # what the body returned when it was captured


class Graphs:
    """Runs pieces of work by key: as they are the first time, captured the second, replayed from then on.

    A piece must do the same work on the same memory whenever its key is the same: what changes has to be written to
    where it reads from, in place. On replay none of its Python runs. All graphs take their memory from one pool: what a
    piece returns is valid until the next one runs, unless somebody keeps a reference from before that was captured.

    Args:
        device: a CUDA device.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"passes can be captured on a CUDA device only, not on {device.type}")
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, _Captured] = {}
        self._seen: set[Hashable] = set()

    def clear(self) -> None:
        """Forget all graphs: something that they read has moved."""
        self._captured.clear()
        self._seen.clear()

    def run(self, key: Hashable, body: Callable[[], Result]) -> Result:
        """Do `body`'s work; returns what it returned when its Python last ran for this key."""
        captured = self._captured.get(key)
        if captured is None and key not in self._seen:  # compiles and allocates what a capture must not
            self._seen.add(key)
            return body()
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = body()
            captured = self._captured[key] = _Captured(graph, result)
        captured.graph.replay()
        return captured.result  # type: ignore[return-value]


class CapturedPasses:
    """Runs a rollout's passes and commits by graphs, one for every kind of pass that meets a cache of the same layout.

    While a cache fills up each pass meets another layout, and runs as it is. The host looks at the device once a chunk:
    whether what is to be committed is finite.

    Args:
        transformer, state: of the rollout.

    Raises:
        ValueError: something in the rollout that graphs cannot do: the message says what.
    """

    def __init__(self, transformer: CausalWanTransformer, state: AttentionState) -> None:
        self._check(transformer, state)
        self.transformer, self.state = transformer, state
        self._graphs = Graphs(state.device)
        self._inputs: dict[tuple[str, torch.Size], Tensor] = {}
        self._levels: dict[tuple[float, ...], Tensor] = {}
        state.places.keeps_addresses = True

    def clear(self) -> None:
        """Forget all graphs: the prompt or the state is another, or a pass failed."""
        self._graphs.clear()

    def run(
        self,
        context: PassContext,
        latents: Tensor,
        text: ProjectedTokens | None,
        require_finite: RequireFinite,
        *,
        actions: Tensor | None = None,
        poses: Tensor | None = None,
    ) -> Tensor:
        """One forward under `context`: velocity [B, F, C, h, w] float32, valid until the next pass."""
        inputs = {"latents": latents.float(), "actions": actions, "poses": poses}
        given = {name: self._kept(name, x) for name, x in inputs.items() if x is not None}
        given["timesteps"] = self._levels_of(context, len(latents))
        state, cache = self.state, self.state.cache
        state.begin_pass(context)
        steps = tuple((part.step, part.num_frames) for part in context.parts)
        key = (context.kind, steps, context.num_frames, latents.shape, cache.layout())
        try:
            velocity, finite, staged = self._graphs.run(key, lambda: self._forward(context, given, text))
            for layer, tokens in staged.items():  # by nobody, if it was replayed
                cache.stage(layer, tokens)
            if context.commits:
                require_finite(finite, f"{context.kind} pass")
        except BaseException:
            # later passes of a chunk read what its first one made: all are captured in one chunk, or none
            self.clear()
            state.abort_pass()
            raise
        state.end_pass(lambda work: self._graphs.run(("cache", *key), work))
        return velocity

    def _forward(
        self, context: PassContext, given: dict[str, Tensor], text: ProjectedTokens | None
    ) -> tuple[Tensor, Tensor, dict[int, Staged]]:
        self.state.places.rope.forget()  # its tables are to be made in this graph, if in any
        velocity = self.transformer(**given, attend=self.state.attend, text=text).float()
        staged = dict(self.state.cache.staged) if context.commits else {}
        return velocity, torch.isfinite(velocity).all(), staged

    def _kept(self, name: str, x: Tensor) -> Tensor:
        """An input where graphs read it."""
        kept = self._inputs.get((name, x.shape))
        if kept is None:
            kept = self._inputs[name, x.shape] = x.to(self.state.device, copy=True)
        else:
            kept.copy_(x, non_blocking=True)
        return kept

    def _levels_of(self, context: PassContext, batch: int) -> Tensor:
        """Noise levels [B, F]; copied to the device once."""
        if context.timesteps not in self._levels:
            levels = torch.tensor([context.timesteps], device=self.state.device, dtype=torch.float32)
            self._levels[context.timesteps] = levels.expand(batch, -1)
        return self._levels[context.timesteps]

    @staticmethod
    def _check(transformer: CausalWanTransformer, state: AttentionState) -> None:
        config = transformer.config
        refused = {
            f"a {type(state.cache).__name__}, whose work depends on what is cached": state.cache.layout()
            is None,
            f"{type(state.self_selector).__name__}, which draws on the host": state.self_selector.draws,
            "recorders, which look at every call": bool(state.recorders),
            "an action module, which has a past of its own": config.action_module is not None,
            "an image to start from": config.image_dim is not None or config.condition_channels > 0,
        }
        for what, there in refused.items():
            if there:
                raise ValueError(f"passes cannot be captured with {what}: set capture to false")
