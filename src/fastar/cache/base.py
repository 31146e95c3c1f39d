"""What every cache policy is: staged keys go in at a commit, one view a layer comes out.

Legend: B batch, H heads, S slots, L tokens of a commit, D head dim; tensors are [B, H, S, D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.rope import RotaryEmbedding
from fastar.cache.slots import ReadSlots, SlotFormat, Slots

if TYPE_CHECKING:
    from fastar.cache.lineage import Lineage

Execute = Callable[[Callable[[], int]], int]
"""Does a piece of work on the device, or does again what it did before (`fastar.rollout.capture`)."""


def at_once(work: Callable[[], int]) -> int:
    """`Execute` as a plain call."""
    return work()


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of the attention calls a cache will serve.

    `chunk_frames` is how many frames are compressed at a time: longer commits (a prefill) are taken in such blocks, so
    that filling a cache at once equals filling it chunk by chunk, and a budget must hold at least one. `key_width` is
    how wide the attention engine wants the keys to lie in memory (`fastar.engines.key_width`); None: `head_dim`.
    """

    num_layers: int
    batch: int
    num_heads: int
    head_dim: int
    tokens_per_frame: int
    rope: RotaryEmbedding
    compute_dtype: torch.dtype
    device: torch.device
    chunk_frames: int = 4
    key_width: int | None = None

    @property
    def dense_frame_bytes(self) -> int:
        """Bytes of one latent frame in a dense bfloat16 cache, keys and values of all layers: the unit of budgets."""
        return 2 * 2 * self.num_layers * self.batch * self.num_heads * self.head_dim * self.tokens_per_frame

    @property
    def slot_copy_bytes(self) -> int:
        """Bytes of a key and a value in the compute dtype, in all heads and batch entries of one layer."""
        return 2 * self.batch * self.num_heads * self.head_dim * self.compute_dtype.itemsize


@dataclass
class Staged:
    """One layer's tokens of a committing pass: q_raw, k_raw (before RoPE), k (roped), v, all [B, H, L, D].

    positions: int64 [L, 3], (frame, row, column). q: the queries roped, for those who would rope them again; None where
    nobody has them.
    """

    q_raw: Tensor
    k_raw: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    q: Tensor | None = None


@dataclass
class CacheView:
    """What attention reads of a layer's past, valid until the next commit.

    Attributes:
        k, v: [B, H, S, D] in the compute dtype, k roped. S may be 0.
        log_count: float32 [B, H, S], the logarithm of the tokens a slot stands for, -inf for an empty slot; None if
            every slot is one token.
        positions: int64 [B, H, S, 3], (frame, row, column) that the key is roped to; None if S is 0.
        origins: the same, where the tokens stand in the video; None: `positions`.
        lengths: int32 [B, H], slots that each head has; what is behind them has a log-count of -inf. None: all S.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor | None
    positions: Tensor | None
    origins: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Room:
    """A layer's slots where they lie, with memory for the current tokens behind them: what attention reads.

    k: [B, H, S + tokens, W], W the `CacheSpec.key_width`; what is beyond head_dim is the engine's.
    v: [B, H, S + tokens, D].
    """

    k: Tensor
    v: Tensor


@dataclass
class StoredView:
    """What attention reads of a layer's past as it lies in memory, valid until the next commit.

    Attributes:
        slots: S of them, keys and values packed as `format` says. Where heads have slots of their own, [1, 1, R, ...]:
            the rows of all heads.
        format: of keys and values.
        log_count: as in `CacheView`, or of all rows, [1, 1, R].
        first, lengths: int64 and int32 [B, H], the row of a head's first slot, and its slots, one after the other.
            None: all heads have S.
        longest: slots of the head that has most; None: S.
    """

    slots: Slots
    format: SlotFormat
    log_count: Tensor | None
    first: Tensor | None = None
    lengths: Tensor | None = None
    longest: int | None = None

    @property
    def size(self) -> int:
        """Slots of the head that has most."""
        return self.slots.size if self.longest is None else self.longest

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D], or of all rows."""
        k, v = (self.format.unpack(name, self.slots.fields, dtype) for name in ("key", "value"))
        return k, v

    def padded(self) -> StoredView:
        """The same with as many slots in all heads, empty ones among them, copied."""
        if self.first is None or self.lengths is None:
            return self
        number = torch.arange(self.size, device=self.first.device)
        live = number < self.lengths[..., None]
        rows = torch.where(live, self.first[..., None] + number, 0)
        fields = {name: x[0, 0, rows] for name, x in self.slots.fields.items()}
        counts = torch.zeros((), device=rows.device) if self.log_count is None else self.log_count[0, 0, rows]
        return StoredView(Slots(fields), self.format, torch.where(live, counts, -torch.inf))


@dataclass(frozen=True)
class Packing:
    """Of a cache of 8- or 4-bit slots, which attention could read as the codes they are (`CachePolicy.stored`).

    Attributes:
        format: of the codes.
        read: what the user asks for.
        copy_bytes: of all keys and values that it may keep, in the compute dtype; None if they grow without bound.
        obstacle: why `stored` is not to be had, if it is not.
    """

    format: SlotFormat
    read: ReadSlots
    copy_bytes: int | None
    obstacle: str | None = None


class CachePolicy(ABC):
    """What is kept of the past. One instance serves one rollout: configure, `bind`, then passes.

    A committing pass stages every layer and then commits once: all layers change together or, on an error, none. The
    chunk being generated is no part of the cache or its budget; it is the same for all policies.
    """

    def __init__(self) -> None:
        self._spec: CacheSpec | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether a view may ever have log-counts, so that keys lie in memory with room for them."""
        return True

    @property
    def is_bound(self) -> bool:
        """Whether the sizes are known and memory is allocated."""
        return self._spec is not None

    @property
    def spec(self) -> CacheSpec:
        """Sizes given to `bind`."""
        if self._spec is None:
            raise ValueError("the cache has no sizes yet: call bind(spec) first")
        return self._spec

    def bind(self, spec: CacheSpec) -> None:
        """Learn the sizes and allocate; ValueError if the budget cannot hold what the policy promises to keep."""
        if self._spec is not None:
            raise ValueError("this cache already serves a rollout: create a new one for the next")
        self._spec = spec

    def enter(self, context: PassContext) -> bool:
        """Learn which pass reads the views to come; whether they may differ from those of the pass before."""
        return False

    @abstractmethod
    def view(self, layer: int) -> CacheView:
        """The layer's past, up-cast or dequantised; the caller keeps it between commits if it needs it again."""

    def room(self, layer: int, tokens: int) -> Room | None:
        """The slots of `view` with memory for `tokens` more, which the next commit may take in without a copy.

        None if `view` is not to be had in memory: attention then reads a copy. What is behind the slots is not part of
        the cache, and is lost when it changes.
        """
        return None

    @property
    def uneven(self) -> bool:
        """Whether views may have `lengths`."""
        return False

    @property
    def packing(self) -> Packing | None:
        """What there is to know of slots of 8 or 4 bits; None: they have 16."""
        return None

    def stored(self, layer: int) -> StoredView:
        """The slots of `view` as they lie in memory."""
        raise ValueError(f"{type(self).__name__} has no slots that could be read as they are stored")

    @abstractmethod
    def stage(self, layer: int, staged: Staged) -> None:
        """Hand in a layer's tokens; nothing changes before `commit`."""

    @abstractmethod
    def commit(self, first_frame: int, num_frames: int, execute: Execute = at_once) -> None:
        """Take in what all layers staged: frames [first_frame, first_frame + num_frames).

        `execute` does the work on the device, of policies that have a `layout`; others do it at once.
        """

    def layout(self) -> tuple[int, ...] | None:
        """Numbers that change whenever passes or commits find other sizes or another place in memory.

        As long as they stay, every pass of one kind, and every commit, does the same work on the same memory, and waits
        for nothing: it can be captured. None: this policy cannot promise that.
        """
        return None

    @property
    def staged(self) -> Mapping[int, Staged]:
        """What was handed in since the last commit, by layer."""
        raise ValueError(f"{type(self).__name__} does not say what is staged")

    @abstractmethod
    def discard(self) -> None:
        """Forget what is staged."""

    @abstractmethod
    def bytes_used(self) -> int:
        """Bytes of everything that survives a commit: keys, values, scales, counts, positions, statistics."""

    @abstractmethod
    def slots_used(self) -> int:
        """Slots that attention reads, per head, averaged over layers, batch and heads and rounded up."""

    @abstractmethod
    def capacity_bytes(self) -> int | None:
        """The most that `bytes_used` can become; None if it grows without bound."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later results (staged tokens are not part of it), as copies."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue bit for bit from a `state_dict()` of a policy with the same configuration and sizes."""

    def drop_from(self, first_frame: int) -> None:
        """Forget frames from `first_frame` on, so that they can be committed again; ValueError if they cannot."""
        raise ValueError(
            f"{type(self).__name__} cannot rewrite frames it has taken in (from frame {first_frame})"
        )

    def follow(self, lineage: Lineage) -> None:
        """Report arrivals and merges to `lineage`, from before the first commit on, so that recall can be measured."""
        raise ValueError(f"{type(self).__name__} cannot say which slot stands for which token")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
