"""All measures of redundancy of one video, fed from the attention calls of its rollout."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.attention.rope import grid_positions
from fastar.attention.state import AttentionState
from fastar.data.motion import Motion
from fastar.engines.reference import attention_weights
from fastar.metrics.redundancy.correspondence import (
    CorrespondenceAccuracy,
    TrueTokens,
    group_names,
    true_tokens,
)
from fastar.metrics.redundancy.drift import Drift
from fastar.metrics.redundancy.keys import KeySimilarity
from fastar.metrics.redundancy.lags import AttentionByLag
from fastar.metrics.redundancy.means import unit
from fastar.metrics.redundancy.prompt import PromptMass
from fastar.metrics.redundancy.rank import EffectiveRank
from fastar.metrics.redundancy.top_entries import TopEntries

SPACES = ("raw", "roped")
MATCHERS = ("query_raw", "query_roped", "key_raw")
"""Ways to find a token's correspondent: query to key before and after RoPE (the paper), and key to key (cosine)."""
BETWEEN = ("chunks", "steps", "layers")
RANKS = ("key_raw", "key_raw_centred", "key_roped", "value")
PCA_FRAMES, PCA_COMPONENTS = 5, 3


@dataclass(frozen=True)
class _Call:
    """A self-attention call with the positions of its slots: the last `current` of S slots are the current chunk's."""

    event: AttendEvent
    current: int
    positions: Tensor  # int64 [B, H, S, 3]
    live: Tensor  # bool [B, H, S]
    q_raw: Tensor
    k_raw: Tensor

    @property
    def past(self) -> int:
        return self.event.k.shape[2] - self.current


class RedundancyRecorder:
    """Measures one video of one method; tables have a fixed size, whatever the length.

    Committing calls give the keys, values and true correspondences of clean chunks; denoising calls give attention,
    queries and the prompt. Numbers are taken while `active`, but committed queries and values of one chunk are always
    remembered, to be compared with the next. `fastar.metrics.redundancy.rows` makes rows of the store of the tables.

    Args:
        state: of the method, for the positions of its slots.
        num_layers, num_heads: of the backbone.
        motion: the truth about the video; None where nobody knows.
        every: tokens of a committed chunk that are looked at, one in so many.
        query_blocks: blocks of queries of a denoising call that are looked at, evenly spread.
        block_q, block_k: tokens in a block.
        pca_layer: layer whose queries and keys are taken apart, all heads together; None leaves that out.
    """

    def __init__(
        self,
        state: AttentionState,
        num_layers: int,
        num_heads: int,
        *,
        motion: Motion | None = None,
        every: int = 3,
        query_blocks: int = 4,
        block_q: int = 16,
        block_k: int = 32,
        pca_layer: int | None = None,
    ) -> None:
        self.state, self.motion, self.every, self.pca_layer = state, motion, every, pca_layer
        self.num_layers, self.num_heads = num_layers, num_heads
        self.query_blocks, self.block_q, self.active = query_blocks, block_q, False
        sizes = (num_layers, num_heads)
        regions = () if motion is None else motion.regions
        self.regions = (*regions, "all")
        self.groups = () if motion is None else group_names(motion)
        self.keys = {space: KeySimilarity(*sizes) for space in SPACES}
        self.queries = {name: Drift(num_layers, num_regions=len(regions)) for name in BETWEEN}
        self.values = Drift(num_layers, num_regions=len(regions))
        self.top = TopEntries(*sizes, block_q=block_q, block_k=block_k)
        self.lags, self.prompt = AttentionByLag(num_layers), PromptMass(num_layers)
        self.ranks = {name: EffectiveRank(*sizes, centred="centred" in name) for name in RANKS}
        self.matches = CorrespondenceAccuracy(
            *sizes, num_matchers=len(MATCHERS), num_groups=max(1, len(self.groups))
        )
        self._generator = torch.Generator().manual_seed(0)
        # by layer: the frame after a chunk, its raw queries and its values
        self._committed: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._stepped: dict[int, Tensor] = {}  # by layer: raw queries of the step before
        self._layer_before: Tensor | None = None
        self._truth: tuple[int, TrueTokens] | None = None
        self.pictures: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=PCA_FRAMES)

    def on_attend(self, event: AttendEvent) -> None:
        """Take in one call."""
        if event.stream == "self":
            if event.context.commits:
                self._commit(self._call(event))
            elif self.active:
                self._denoise(self._call(event))
        elif event.stream == "text" and self.active and not event.context.commits and event.selection:
            prompt = event.selection.prompt
            weights = attention_weights(self._sample(event.q), prompt.k, log_count=prompt.log_count)
            self.prompt.update(event.layer, weights, prompt)

    def _call(self, event: AttendEvent) -> _Call:
        context, current = event.context, event.q.shape[2]
        batch, heads, slots, _ = event.k.shape
        rope, device = self.state.rope, event.q.device
        own = grid_positions(context.first_frame, context.num_frames, self.state.grid, device=device)
        past = self.state.cache.view(event.layer).positions if slots > current else None
        positions = own.expand(batch, heads, -1, -1)
        if past is not None:
            positions = torch.cat([past.expand(batch, heads, -1, -1), positions], 2)
        live = torch.ones(batch, heads, slots, dtype=torch.bool, device=device)
        if event.log_count is not None:
            live = live & (event.log_count > -torch.inf)
        q_raw, k_raw = rope.unrotate(event.q, own), rope.unrotate(event.k, positions)
        return _Call(event, current, positions, live, q_raw, k_raw)

    # -- committing calls ------------------------------------------------------------------------------------------

    def _commit(self, call: _Call) -> None:
        event, layer = call.event, call.event.layer
        values = event.v[:, :, call.past :]
        if layer == self.pca_layer:
            self._keep_picture(call)
        before = self._committed.get(layer)
        first, following = event.context.first_frame, event.context.first_frame + event.context.num_frames
        if self.active and before is not None and before[0] == first:
            regions = self._regions(event)
            self.queries["chunks"].update(layer, call.q_raw, before[1], regions)
            self.values.update(layer, values, before[2], regions)
        self._committed[layer] = (following, call.q_raw.clone(), values.clone())
        if self.active and call.past:
            self._compare_keys(call)
            if self.motion is not None:
                self._match(call)
        if self.active:
            kept = {
                "key_raw": call.k_raw,
                "key_raw_centred": call.k_raw,
                "key_roped": event.k,
                "value": event.v,
            }
            for name, x in kept.items():
                self.ranks[name].update(layer, x, call.live)

    def _compare_keys(self, call: _Call) -> None:
        event, past = call.event, call.past
        frames = call.positions[..., 0]
        for space, q, k in (("raw", call.q_raw, call.k_raw), ("roped", event.q, event.k)):
            self.keys[space].update(
                event.layer,
                k[:, :, past :: self.every],
                k[:, :, :past],
                new_frames=frames[0, 0, past :: self.every],
                past_frames=frames[:, :, :past],
                live=call.live[:, :, :past],
                queries=q,
                new_values=event.v[:, :, past :: self.every],
                past_values=event.v[:, :, :past],
                generator=self._generator,
            )

    def _match(self, call: _Call) -> None:
        event, part = call.event, slice(call.past, None, self.every)
        probes = [call.q_raw[0], event.q[0], unit(call.k_raw[0, :, call.past :].float())]
        found = [call.k_raw[0], event.k[0], unit(call.k_raw[0].float())]
        scores = [
            probe[:, :: self.every].float() @ keys.float().mT
            for probe, keys in zip(probes, found, strict=True)
        ]
        own = call.positions[0, 0, part].cpu()
        self.matches.update(
            event.layer,
            [score.cpu() for score in scores],
            call.positions[0].cpu(),
            call.live[0].cpu(),
            self._true(event, own),
        )

    def _true(self, event: AttendEvent, own: Tensor) -> TrueTokens:
        """The truth about tokens at `own` [N, 3], which every layer of a pass asks for."""
        assert self.motion is not None
        first = event.context.first_frame
        if self._truth is None or self._truth[0] != first:
            self._truth = (first, true_tokens(self.motion, own, self.state.grid[1]))
        return self._truth[1]

    def _regions(self, event: AttendEvent) -> Tensor | None:
        if self.motion is None:
            return None
        context = event.context
        frames = range(context.first_frame, context.first_frame + context.num_frames)
        return torch.cat([self.motion.region(frame) for frame in frames])

    def _keep_picture(self, call: _Call) -> None:
        """Raw queries and keys of the chunk's first frame, [n, heads * D]."""
        tokens = self.state.grid[0] * self.state.grid[1]
        first = call.past + tokens
        keys = call.k_raw[0, :, call.past : first]
        queries, keys = (x.transpose(0, 1).flatten(1).cpu() for x in (call.q_raw[0, :, :tokens], keys))
        self.pictures.append((call.event.context.first_frame, queries, keys))

    # -- denoising calls -------------------------------------------------------------------------------------------

    def _denoise(self, call: _Call) -> None:
        event, layer, regions = call.event, call.event.layer, self._regions(call.event)
        if event.context.step > 0 and layer in self._stepped:
            self.queries["steps"].update(layer, call.q_raw, self._stepped[layer], regions)
        if layer > 0 and self._layer_before is not None:
            self.queries["layers"].update(layer, call.q_raw, self._layer_before, regions)
        self._stepped[layer] = self._layer_before = call.q_raw.clone()
        plan = event.plan
        if plan is None:
            weights = attention_weights(self._sample(event.q), event.k, log_count=event.log_count)
        else:  # a plan is of all queries
            weights = self._sample(attention_weights(event.q, event.k, log_count=event.log_count, plan=plan))
        self.top.update(layer, weights, event.v, call.live)
        frames = call.positions[..., 0]
        own = frames[0, 0, call.past :][None, None, :, None]
        self.lags.update(layer, weights, self._sample(own)[0, 0, :, 0], frames, call.live)

    def _sample(self, x: Tensor) -> Tensor:
        """Whole blocks of queries, evenly spread, of x [B, H, Q, D]; all of them if they are no whole blocks."""
        queries = x.shape[2]
        if queries % self.block_q or queries <= self.block_q:
            return x[:, :, : self.block_q]
        blocks = x.unflatten(2, (-1, self.block_q))
        step = max(1, blocks.shape[2] // self.query_blocks)
        return blocks[:, :, step // 2 :: step].flatten(2, 3)
