"""All method state of one rollout: the object whose `attend` the backbone calls.

Per pass: `begin_pass(context)`, then the backbone's forward, which calls `attend` once per stream and layer, then
`end_pass()`. Layers only stage their keys and values; `end_pass` of a committing pass changes the cache, all layers
at once, so that a crash in mid-pass leaves the old state.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastar import engines
from fastar.attention.actions import ActionStreams
from fastar.attention.context import PassContext, Stream
from fastar.attention.events import AttendEvent, Recorder
from fastar.attention.places import PlaceMemory, Places
from fastar.attention.reading import reading_of
from fastar.attention.rope import RotaryEmbedding
from fastar.attention.self_stream import SelfStream
from fastar.attention.tags import PromptTags, tags_for
from fastar.attention.text import Selection, TextStream
from fastar.attention.working import WorkingMemory
from fastar.cache.base import CachePolicy, CacheSpec, Execute, at_once
from fastar.sparsity import CrossSelector, Selector
from fastar.sparsity.base import Scheduled


class AttentionState:
    """Cache, selectors and engine of one rollout, behind the backbone's one call.

    Args:
        cache: policy that keeps the past of the self stream; bound here, so one instance serves one rollout.
        self_selector: which pairs of the self stream are computed.
        cross_selector: which text tokens are kept.
        engine: name of an attention engine, or `auto` (chosen once, see `self.engine`; `self.passed_over` says why not
            one that is known to be faster). `self.reading` says how it reads the cache: packed slots by a kernel of
            their own.
        rope, grid: the backbone's rotary embedding and tokens per frame (rows, columns).
        num_layers, num_heads, head_dim, batch, chunk_frames, compute_dtype, device: sizes of the calls to come.
        recorders: see every attention call.
        actions: the past of an action module's streams, for a backbone that has one.
    """

    def __init__(
        self,
        *,
        cache: CachePolicy,
        self_selector: Selector,
        cross_selector: CrossSelector,
        engine: str,
        rope: RotaryEmbedding,
        grid: tuple[int, int],
        num_layers: int,
        num_heads: int,
        head_dim: int,
        batch: int,
        chunk_frames: int,
        compute_dtype: torch.dtype,
        device: torch.device,
        recorders: Sequence[Recorder] = (),
        actions: ActionStreams | None = None,
    ) -> None:
        self.cache, self.self_selector, self.cross_selector = cache, self_selector, cross_selector
        self.text = TextStream(cross_selector)
        self.tags = tags_for(self_selector, cross_selector, grid)
        calls = engines.example_call(
            dtype=compute_dtype, head_dim=head_dim, device=device,
            blocks=self_selector.blocks, tags=self_selector.tags_in_blocks,
        )  # fmt: skip
        self.engine = engines.resolve(engine, device, calls)
        self.passed_over = engines.choose(device, calls)[1] if engine == "auto" else {}
        self.engine_for_few_keys = engines.for_few_keys(device, calls) if engine == "auto" else None
        self.rope, self.grid, self.recorders = rope, grid, list(recorders)
        self.actions = actions
        if self.tags is not None:
            self.recorders.append(self.tags)
        self.context: PassContext | None = None
        self.places = PlaceMemory(rope, grid, device)
        self._here: Places | None = None  # of the pass
        key_width = engines.key_width(self.engine, head_dim, device) if cache.counts_tokens else head_dim
        self.device = device
        if not self.cache.is_bound:  # a follower of a `TeeCache` is bound, and filled, by its leader
            self.cache.bind(
                CacheSpec(
                    num_layers=num_layers,
                    batch=batch,
                    num_heads=num_heads,
                    head_dim=head_dim,
                    tokens_per_frame=grid[0] * grid[1],
                    rope=rope,
                    compute_dtype=compute_dtype,
                    device=device,
                    chunk_frames=chunk_frames,
                    key_width=key_width,
                )
            )
        self.reading = reading_of(self.cache, self_selector, self.engine, device, compute_dtype)
        self._memory = WorkingMemory(cache, key_width, packed=self.reading.packed, ragged=self.reading.ragged)
        self.self_stream = SelfStream(
            cache=cache, memory=self._memory, selector=self_selector, engine=self.engine, tags=self.tags, rope=rope,
            grid=grid, device=device,
        )  # fmt: skip

    def begin_pass(self, context: PassContext) -> None:
        """Announce the pass whose attention calls follow."""
        if self.context is not None:
            raise RuntimeError("begin_pass was called inside a pass: call end_pass or abort_pass first")
        if self.actions is not None:
            self.actions.begin_pass(context)
        self.context = context
        if self.cache.enter(context):
            self.forget_working_copies()
        self._here = self.places.of(context.first_frame, context.num_frames)

    def end_pass(self, execute: Execute = at_once) -> None:
        """Close the pass; if it commits, the staged keys of all layers enter the cache together.

        If they cannot (out of memory, a layer that was never called), the pass is aborted and the error goes on.
        `execute` does the cache's work on the device.
        """
        context = self._require_context()
        if context.commits:
            try:
                told = {} if self.actions is None else self.actions.following()
                self.cache.commit(context.first_frame, context.num_frames, execute)
            except BaseException:
                self.abort_pass()
                raise
            if self.actions is not None:
                self.actions.replace(told, context.first_frame + context.num_frames)
            self.cache_changed(context.first_frame + context.num_frames)
        self.context = None

    def abort_pass(self) -> None:
        """Close a pass that failed: the cache stays as it was before it."""
        self.cache.discard()
        if self.actions is not None:
            self.actions.discard()
        self.context = None

    def rewrite(self, first_frame: int) -> None:
        """Drop what is cached from `first_frame` on, so that those frames can be committed again (prompt switch)."""
        self.cache.drop_from(first_frame)
        if self.actions is not None:
            self.actions.drop_from(first_frame)
        self.forget_working_copies()

    def prompt_changed(self) -> None:
        """Forget what is known about the prompt: another is read from the next pass on."""
        self.restore_in_flight({})
        if self.tags is not None:
            self.tags.prompt_changed()

    def cache_changed(self, next_frame: int) -> None:
        """Frames before `next_frame` are committed, by this state or by somebody else: read the cache afresh."""
        self.forget_working_copies()
        for keeper in self._keepers().values():
            keeper.forget(next_frame)

    def follow_actions(self, other: "AttentionState") -> None:
        """Have the past of actions that `other` has, whose commits have filled this state's cache (protocol A)."""
        if self.actions is not None and other.actions is not None:
            self.actions.follow(other.actions)

    def forget_working_copies(self) -> None:
        """Copy what the cache keeps once more in the next pass."""
        self._memory.forget()

    def working_bytes(self) -> int:
        """Bytes of what attention reads that is not in the cache: copies of slots, and those in the order of a plan."""
        return self._memory.nbytes()

    def in_flight(self) -> dict[str, Any]:
        """What is remembered of chunks in flight, of which there have been passes; empty if there are none."""
        found = {name: keeper.in_flight() for name, keeper in self._keepers().items()}
        return {name: kept for name, kept in found.items() if kept}

    def restore_in_flight(self, saved: dict[str, Any]) -> None:
        """Remember what `in_flight` returned, and nothing else."""
        for name, keeper in self._keepers().items():
            keeper.restore_in_flight(saved.get(name, {}), self.device)

    def _keepers(self) -> dict[str, Scheduled | PromptTags]:
        keepers: dict[str, Scheduled | PromptTags] = {
            "self": self.self_selector,
            "cross": self.cross_selector,
        }
        return keepers if self.tags is None else keepers | {"tags": self.tags}

    def attend(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The backbone's one call: q, k, v [B, H, L, D] before RoPE -> [B, H, Lq, D]."""
        context = self._require_context()
        if stream == "self":
            tell = self._tell if self.recorders else None
            return self.self_stream.attend(layer, context, self._require_places(), q, k, v, tell)
        if stream == "text":
            return self._attend_text(layer, context, q, k, v)
        if stream in ("mouse", "keyboard"):
            if self.actions is None:
                raise RuntimeError(f"the {stream} stream needs a state with actions: see start_rollout")
            q, k, v = self.actions.prepare(stream, layer, context, q, k, v)
        return self._execute(stream, layer, context, q, k, v, log_count=None, candidates=k.shape[2])

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """Passes that repeat earlier ones: no measure sees them."""
        kept, self.recorders = self.recorders, [] if self.tags is None else [self.tags]
        try:
            yield
        finally:
            self.recorders = kept

    def replay(self, event: AttendEvent) -> AttendEvent:
        """What this method makes of another rollout's self-attention call: its queries and its current chunk, own past.

        Nothing is staged and no recorder sees it. Call it between passes of this state.
        """
        self.begin_pass(event.context)  # for its positions
        try:
            return self.self_stream.replay(event, self._require_places())
        finally:
            self.context = None

    def state_dict(self) -> dict[str, Any]:
        """The cache, what selectors remember and the past of actions; bit for bit."""
        if self.context is not None:
            raise RuntimeError("a state can be saved between passes only: call end_pass first")
        tags = {} if self.tags is None else {"tags": self.tags.state_dict()}
        actions = {} if self.actions is None else {"actions": self.actions.state_dict()}
        in_flight = self.in_flight()
        kept = {"in_flight": in_flight} if in_flight else {}
        return {"cache": self.cache.state_dict()} | tags | actions | kept

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a state with the same configuration."""
        self.cache.load_state_dict(saved["cache"])
        if self.tags is not None:
            self.tags.load_state_dict(saved["tags"], self.device)
        self.restore_in_flight(saved.get("in_flight", {}))
        if self.actions is not None:
            self.actions.load_state_dict(saved["actions"], self.device)
        self.forget_working_copies()

    def _attend_text(self, layer: int, context: PassContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for part, rows, _ in context.parts_in_tokens(self.grid[0] * self.grid[1]):
            own = q[:, :, rows]
            short_k, short_v, log_count, selection = self.text.prepare(layer, part, own, k, v)
            outs.append(
                self._execute(
                    "text", layer, part, own, short_k, short_v,
                    log_count=log_count, candidates=k.shape[2], selection=selection,
                )
            )  # fmt: skip
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _execute(
        self,
        stream: Stream,
        layer: int,
        context: PassContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_count: Tensor | None,
        candidates: int,
        selection: Selection | None = None,
    ) -> Tensor:
        few = log_count is None and k.shape[2] <= engines.FEW_KEYS
        engine = self.engine_for_few_keys if few and self.engine_for_few_keys else self.engine
        out, _ = engines.attend(q, k, v, log_count=log_count, engine=engine)
        self._tell(AttendEvent(stream, layer, context, q, k, v, log_count, None, out, candidates, selection))
        return out

    def _tell(self, event: AttendEvent) -> None:
        for recorder in self.recorders:
            recorder.on_attend(event)

    def _require_places(self) -> Places:
        if self._here is None:
            raise RuntimeError("attention was called outside a pass: call begin_pass first")
        return self._here

    def _require_context(self) -> PassContext:
        if self.context is None:
            raise RuntimeError("attention was called outside a pass: call begin_pass first")
        return self.context
