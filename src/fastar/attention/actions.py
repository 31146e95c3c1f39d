"""The past of an action module's two streams, mouse and keyboard: the same for every method.

Both look back over a few latent frames only: what they keep is a short window, no part of a method's cache or budget.
In the mouse stream every place in the picture is a sequence of the batch; in both, keys are one a frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastar.attention.context import PassContext, Stream
from fastar.attention.rope import RotaryEmbedding, apply_rotation


class ActionStreams:
    """Keys, roped, and values of the newest committed frames, by stream and layer: [2, B, H, frames, D].

    Args:
        rope: of the action module; it turns with the frame alone.
        frames: latent frames that a chunk attends to, its own included. A longer chunk attends to all of itself.
    """

    def __init__(self, rope: RotaryEmbedding, frames: int) -> None:
        self.rope, self.frames = rope, frames
        self.next_frame = 0
        self._kept: dict[tuple[Stream, int], Tensor] = {}
        self._staged: dict[tuple[Stream, int], Tensor] = {}
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}  # of the current pass, by tokens

    def begin_pass(self, context: PassContext) -> None:
        """Announce the pass whose calls follow.

        Raises:
            ValueError: it does not begin where the kept past ends.
        """
        if context.first_frame != self.next_frame:
            raise ValueError(
                f"the action streams hold the frames before {self.next_frame} and the pass begins at "
                f"{context.first_frame}: commit the frames between them, or rewrite from there"
            )
        self._tables = {}

    def prepare(
        self, stream: Stream, layer: int, context: PassContext, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, Lq, D], roped, with the keys and values that it attends to: the past's, and k and v [B, H, F, D]."""
        q, k = self._rotate(q, context), self._rotate(k, context)
        own = torch.stack([k, v])
        if context.commits:
            self._staged[stream, layer] = own
        k, v = self._after_past((stream, layer), own)
        return q, k, v

    def following(self) -> dict[tuple[Stream, int], Tensor]:
        """What there is to keep once this pass is committed: for `replace`, when the rest has been.

        Raises:
            ValueError: a stream of a layer that has a past was not called.
        """
        silent = sorted(self._kept.keys() - self._staged.keys())
        if silent:
            raise ValueError(f"a commit needs every action stream of every layer; missing: {silent}")
        return {key: self._after_past(key, own) for key, own in self._staged.items()}

    def replace(self, kept: dict[tuple[Stream, int], Tensor], next_frame: int) -> None:
        """Keep this past, which ends before `next_frame`."""
        self._kept, self.next_frame = dict(kept), next_frame
        self.discard()

    def discard(self) -> None:
        """Forget what a pass has staged."""
        self._staged.clear()

    def drop_from(self, first_frame: int) -> None:
        """Drop frames from `first_frame` on. What had left the window before does not come back: it is shorter then."""
        removed = self.next_frame - first_frame
        if removed > 0:
            left = {key: kept[..., : max(0, kept.shape[-2] - removed), :] for key, kept in self._kept.items()}
            self.replace(left, first_frame)

    def follow(self, other: ActionStreams) -> None:
        """Have the past of `other`: nothing of it is ever written in place."""
        self.replace(other._kept, other.next_frame)

    def state_dict(self) -> dict[str, Any]:
        """The past, as copies on the CPU."""
        kept = {key: tensor.cpu().clone() for key, tensor in self._kept.items()}
        return {"next_frame": self.next_frame, "kept": kept}

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Continue from `state_dict`."""
        kept = {key: tensor.to(device) for key, tensor in saved["kept"].items()}
        self.replace(kept, int(saved["next_frame"]))

    def _after_past(self, key: tuple[Stream, int], own: Tensor) -> Tensor:
        """The chunk's own keys and values behind as much of the past as it sees."""
        past, room = self._kept.get(key), self.frames - own.shape[-2]
        if past is None or room <= 0:
            return own
        return torch.cat([past[..., -room:, :], own], dim=-2)

    def _rotate(self, x: Tensor, context: PassContext) -> Tensor:
        """x [B, H, L, D], equally many tokens of each frame, frame-major, turned to its frames."""
        tokens = x.shape[2]
        if tokens not in self._tables:
            last = context.first_frame + context.num_frames
            frames = torch.arange(context.first_frame, last, device=x.device)
            positions = x.new_zeros(tokens, 3, dtype=torch.long)
            positions[:, 0] = frames.repeat_interleave(tokens // context.num_frames)
            self._tables[tokens] = self.rope.tables(positions)
        return apply_rotation(x, self._tables[tokens])
