"""The self stream of a rollout: the past and the chunks in the making, and which pairs of them are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.events import AttendEvent
from fastar.attention.packed import PackedKeys
from fastar.attention.place import Placement
from fastar.attention.places import Places
from fastar.attention.request import request_of
from fastar.attention.rope import RotaryEmbedding, grid_positions
from fastar.attention.tags import PromptTags
from fastar.attention.working import OrderedKeys, WorkingKeys, WorkingMemory
from fastar.cache.base import CachePolicy, Staged
from fastar.engines.plan import BlockPlan
from fastar.sparsity import Selector


class SelfStream:
    """Self-attention's side of an `AttentionState`.

    In every layer: current tokens are put behind the past, staged if the pass commits, and attended to by the plan of
    the selector.

    Args:
        cache: where what commits is staged; bound.
        memory: what is read of it.
        selector: which pairs are computed.
        engine: resolved name.
        tags: the prompt buckets that the selector asks for, if it does.
        rope, grid: the backbone's rotary embedding and tokens per frame (rows, columns).
        device: of the calls to come.
    """

    def __init__(
        self,
        *,
        cache: CachePolicy,
        memory: WorkingMemory,
        selector: Selector,
        engine: str,
        tags: PromptTags | None,
        rope: RotaryEmbedding,
        grid: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.cache, self.memory, self.selector, self.engine = cache, memory, selector, engine
        self.tags, self.rope, self.grid, self.device = tags, rope, grid, device

    def attend(
        self,
        layer: int,
        context: PassContext,
        places: Places,
        q_raw: Tensor,
        k_raw: Tensor,
        v: Tensor,
        tell: Callable[[AttendEvent], None] | None,
    ) -> Tensor:
        """Of the current tokens [B, H, L, D], before RoPE: [B, H, L, D].

        Args:
            layer, context, places: of the call.
            tell: whom to tell of what is executed; None: nobody looks.
        """
        working = self.memory.of(layer, k_raw)
        current_k, current_v = working.current
        q = q_raw.new_empty(*q_raw.shape[:3], current_k.shape[3])
        ordered = self._standing(layer, context, working)
        # where nobody else looks at them, current tokens are put straight into the order of the plan
        straight = ordered is not None and not context.commits and tell is None
        targets, q_order = (current_k, current_v), None
        if ordered is not None and straight:
            targets, q_order = ordered.current, ordered.plan.query_order
        Placement(q_raw, k_raw, v, places.turns, q, *targets, q_order=q_order).run()
        if context.commits:
            width = working.head_dim
            staged = Staged(
                q_raw=q_raw, k_raw=k_raw, k=current_k[..., :width], v=current_v, positions=places.positions,
                q=q[..., :width],
            )  # fmt: skip
            self.cache.stage(layer, staged)
        if ordered is not None and straight:
            return ordered.attend(q, self.engine, q_in_order=q_order is not None)
        if ordered is not None:
            for target, current in zip(ordered.current, (current_k, current_v), strict=True):
                target.copy_(current)
            return self._execute(layer, context, q, working, ordered.plan, ordered, tell)
        outs = []
        for part, rows, keys in context.parts_in_tokens(self.grid[0] * self.grid[1]):
            own, seen, raw = q[:, :, rows], working.until(keys), (q_raw[:, :, rows], k_raw[:, :, :keys])
            plan = self._plan(layer, part, own[..., : seen.head_dim], seen, places, raw)
            if plan is not None and self.selector.keeps_plans and not context.chunks:
                assert isinstance(seen, WorkingKeys)
                ordered = self.memory.ordered(layer, seen, plan)
            outs.append(self._execute(layer, part, own, seen, plan, ordered, tell))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def replay(self, event: AttendEvent, places: Places) -> AttendEvent:
        """See `AttentionState.replay`; `places`: of the event's pass."""
        context, current = event.context, event.current_keys
        k, v = event.k[:, :, -current:], event.v[:, :, -current:]
        working = self._fill(event.layer, k, v)
        plan = self._plan(event.layer, context, event.q, working, places)
        out = working.attend(event.q, plan, self.engine)
        return AttendEvent(
            "self", event.layer, context, event.q, *working.seen(), plan, out, candidates=working.total
        )

    def _standing(
        self, layer: int, context: PassContext, working: WorkingKeys | PackedKeys
    ) -> OrderedKeys | None:
        """The past in the order of a plan that was made in an earlier pass, if there is one that this pass goes by."""
        if context.chunks or isinstance(working, PackedKeys):
            return None
        total = working.total
        plan = self.selector.standing(layer, context, total - working.cached, total)
        return None if plan is None else self.memory.ordered(layer, working, plan)

    def _execute(
        self,
        layer: int,
        context: PassContext,
        q: Tensor,
        keys: WorkingKeys | PackedKeys,
        plan: BlockPlan | None,
        ordered: OrderedKeys | None,
        tell: Callable[[AttendEvent], None] | None,
    ) -> Tensor:
        """Attention of q [B, H, L, W] over working keys of that width, read where they are `ordered`, if given."""
        out = keys.attend(q, plan, self.engine) if ordered is None else ordered.attend(q, self.engine)
        if tell is not None:  # whose keys may have to be unpacked
            own, total = q[..., : keys.head_dim], keys.total
            tell(AttendEvent("self", layer, context, own, *keys.seen(), plan, out, candidates=total))
        return out

    def _fill(self, layer: int, k: Tensor, v: Tensor) -> WorkingKeys | PackedKeys:
        """The past, with roped keys and values [B, H, L, D] of the current tokens."""
        working = self.memory.of(layer, k)
        current_k, current_v = working.current
        current_k[..., : k.shape[3]] = k
        current_v[:] = v
        return working

    def _plan(
        self,
        layer: int,
        context: PassContext,
        q: Tensor,
        working: WorkingKeys | PackedKeys,
        places: Places,
        raw: tuple[Tensor, Tensor] | None = None,
    ) -> BlockPlan | None:
        """The pairs to compute of a chunk's queries. `raw`: its queries and the current keys before RoPE, or undone."""
        if self.selector.is_dense(layer, context):
            return None
        assert isinstance(working, WorkingKeys)  # `reading_of` has seen to that
        if raw is None:
            first, stop = context.visible
            own = (first, stop - first) == (context.first_frame, context.num_frames)
            here = places.positions
            theirs = here if own else grid_positions(first, stop - first, self.grid, self.device)
            current = working.own_keys[:, :, working.cached :]
            raw = (self.rope.unrotate(q, here), self.rope.unrotate(current, theirs))
        tags = (None, None) if self.tags is None else self.tags.of(layer, context, working.origins)
        request = request_of(
            layer, context, q, *raw, working,
            rope=self.rope if self.selector.match_space == "raw" else None, tags=tags,
        )  # fmt: skip
        return self.selector.plan(request)
