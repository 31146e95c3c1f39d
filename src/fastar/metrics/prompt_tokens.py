"""Which prompt tokens cross-attention reads, held against dense attention and, where it is known, against the truth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastar.attention.context import PassKind
from fastar.engines.reference import attention_weights

if TYPE_CHECKING:
    from fastar.attention.events import AttendEvent


class PromptRecorder:
    """Recorder of the text stream's sparse denoising calls; padding never counts.

    Per video of a chunk, means over those calls (every pass, layer and head weighs the same):
        prompt_share: tokens read / tokens of the prompt.
        prompt_mass: attention that dense pays to the tokens read / that it pays to all tokens.
        prompt_recall, prompt_precision: tokens read of those that matter to a frame of the chunk; tokens that matter of
            those read. Only with a truth.
    and, over the tokens that any head of any layer reads in a pass: prompt_share_any, prompt_recall_any.
    A chunk without a sparse call reads everything.

    Args:
        relevance: bool [B, F, S], whether a token matters to a frame, or None where nobody knows.
    """

    def __init__(self, relevance: Tensor | None = None) -> None:
        self.relevance = relevance
        self._calls: dict[str, list[Tensor]] = {}
        self._read: dict[int, Tensor] = {}  # by step: bool [B, S], by any head of any layer
        self._reads: list[Tensor] = []  # by call: [B, S], share of heads that read a token of the prompt
        self._chunk: tuple[Tensor, Tensor | None] | None = None  # real and relevant tokens, bool [B, S]

    def on_attend(self, event: AttendEvent) -> None:
        """Look at one call."""
        if event.stream != "text" or event.context.kind != PassKind.DENOISE or event.selection is None:
            return
        prompt, keep = event.selection.prompt, event.selection.keep
        relevant = self._relevant(event, prompt.tokens)
        if self._chunk is None:
            self._chunk = (prompt.real[:, 0], None if relevant is None else (relevant & prompt.real)[:, 0])
        if keep is None:
            return
        real, read = prompt.real, keep & prompt.real
        mass = attention_weights(event.q, prompt.k, log_count=prompt.log_count).mean(2)
        self._add("prompt_share", _share(read, real))
        self._add("prompt_mass", (mass * read).sum(-1) / (mass * real).sum(-1).clamp(min=1e-9))
        if relevant is not None:
            self._add("prompt_recall", _share(read & relevant, real & relevant))
            self._add("prompt_precision", _share(read & relevant, read))
        self._reads.append(_of_tokens(read, prompt.tokens).float().mean(1))
        step, anyone = event.context.step, read.any(1)
        self._read[step] = self._read[step] | anyone if step in self._read else anyone

    def read(self) -> Tensor | None:
        """Share of the chunk's sparse calls, passes, layers and heads together, that read a token: [B, S].

        None if there was no such call: all is read. Ask before `scores`, which forgets it.
        """
        return torch.stack(self._reads).mean(0) if self._reads else None

    def scores(self) -> dict[str, list[float]]:
        """The measures of the chunk since the last call, one number a video; forgets them."""
        if self._chunk is not None and not self._calls:
            self._read_all(*self._chunk)
        found = {name: torch.stack(values).nanmean((0, 2)).tolist() for name, values in self._calls.items()}
        found |= {name: values.tolist() for name, values in self._of_any()}
        self._calls, self._read, self._chunk, self._reads = {}, {}, None, []
        return found

    def _read_all(self, real: Tensor, relevant: Tensor | None) -> None:
        everything = torch.ones_like(real[:, :1], dtype=torch.float32)
        self._add("prompt_share", everything)
        self._add("prompt_mass", everything)
        if relevant is not None:
            self._add("prompt_recall", everything)
            self._add("prompt_precision", _share(relevant, real)[:, None])

    def _of_any(self) -> Iterator[tuple[str, Tensor]]:
        if self._chunk is None:
            return
        real, relevant = self._chunk
        passes = list(self._read.values()) or [real]
        yield "prompt_share_any", torch.stack([_share(read, real) for read in passes]).nanmean(0)
        if relevant is not None:
            shares = [_share(read & relevant, relevant) for read in passes]
            yield "prompt_recall_any", torch.stack(shares).nanmean(0)

    def _relevant(self, event: AttendEvent, tokens: Tensor | None) -> Tensor | None:
        """bool [B, H, S]: whether a slot's token matters to a frame of the chunk."""
        if self.relevance is None:
            return None
        first = event.context.first_frame
        self.relevance = self.relevance.to(event.q.device)  # once
        frames = self.relevance[:, first : first + event.context.num_frames]
        relevant = frames.any(1)[:, None].expand(-1, event.q.shape[1], -1)
        return relevant if tokens is None else relevant.gather(2, tokens)

    def _add(self, name: str, values: Tensor) -> None:
        """One call's values [B, H]."""
        self._calls.setdefault(name, []).append(values)


def _of_tokens(slots: Tensor, tokens: Tensor | None) -> Tensor:
    """bool [B, H, S] of slots -> of the tokens of the prompt; slots that merge padding speak for their first token."""
    if tokens is None:
        return slots
    length = int(tokens.max()) + 1
    return torch.zeros(*slots.shape[:2], length, dtype=torch.bool, device=slots.device).scatter_(
        2, tokens, slots
    )


def _share(some: Tensor, of: Tensor) -> Tensor:
    """Members of `some` / members of `of`, NaN where there are none: bool [..., S] each -> [...]."""
    return some.sum(-1) / torch.where(of.any(-1), of.sum(-1), torch.nan)
