"""What heads lose by forgetting: the measurement behind `fastar.cache.HeadErrors`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.cache.head_errors import HeadErrors


class ForgettingProbe:
    """Recorder of a dense rollout: the error of every self-attention head if it saw its newest frames only.

    It looks while `active`. Every call (layer, denoising step or commit) and video weighs the same.

    Args:
        projections: of every layer, the weight [dim, heads * head_dim] that attention's output goes through.
        tokens_per_frame: of the backbone.
        frames: ascending numbers of past frames that a head may keep.
        every: queries looked at, one in so many.
    """

    def __init__(
        self, projections: Sequence[Tensor], *, tokens_per_frame: int, frames: Sequence[int], every: int = 3
    ) -> None:
        self.projections, self.tokens, self.frames, self.every = projections, tokens_per_frame, frames, every
        self.active = False
        self._sums: dict[int, Tensor] = {}  # by layer: [H, n]
        self._calls: dict[int, int] = {}

    def on_attend(self, event: AttendEvent) -> None:
        """Take in one call."""
        if not self.active or event.stream != "self":
            return
        seen = self._outputs(event)  # [n, B, H, Q, D]
        heads, head_dim = event.q.shape[1], event.q.shape[3]
        weight = self.projections[event.layer].float().unflatten(1, (heads, head_dim))  # [dim, H, D]
        full = event.out[:, :, :: self.every].float()
        whole = torch.einsum("bhqd,ehd->bqe", full, weight).square().sum(-1).mean(1)  # [B]
        error = torch.einsum("nbhqd,ehd->nbhqe", seen - full, weight).square().sum(-1).mean(3)  # [n, B, H]
        relative = (error / whole[:, None]).mean(1).T
        self._sums[event.layer] = self._sums.get(event.layer, 0) + relative
        self._calls[event.layer] = self._calls.get(event.layer, 0) + 1

    def result(self, weights: str | None) -> HeadErrors:
        """What was measured, for the checkpoint of sha256 `weights`."""
        if not self._sums:
            raise ValueError(
                "nothing was measured: no self-attention call was seen while the probe was active"
            )
        means = [self._sums[layer] / self._calls[layer] for layer in sorted(self._sums)]
        errors = tuple(tuple(tuple(curve) for curve in layer.tolist()) for layer in means)
        return HeadErrors(tuple(self.frames), errors, weights)

    def _outputs(self, event: AttendEvent) -> Tensor:
        """Attention over the current chunk and the newest `frames`, for each of them: [n, B, H, Q, D]."""
        q = event.q[:, :, :: self.every].float() * event.q.shape[-1] ** -0.5
        logits = q @ event.k.float().mT
        mass = (logits - logits.amax(-1, keepdim=True)).exp()
        value, keys = event.v.float(), event.k.shape[2]
        start = keys - event.current_keys
        total, weighted = mass[..., start:].sum(-1, keepdim=True), mass[..., start:] @ value[:, :, start:]
        seen = []
        for frames in self.frames:
            stop, start = start, max(0, keys - event.current_keys - frames * self.tokens)
            part = slice(start, stop)
            total = total + mass[..., part].sum(-1, keepdim=True)
            weighted = weighted + mass[..., part] @ value[:, :, part]
            seen.append(weighted / total)
        return torch.stack(seen)
