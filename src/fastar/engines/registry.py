"""What an attention engine is, which there are, and whether one fits a call.

To add an engine, write a module that defines an `Engine` and name it in `_ENTRIES`, and in `fastar.engines.auto` once
it is measured. Modules are imported on first use, so that a missing kernel package costs nothing until its engine is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from fastar.engines.augmented import augmented_width
from fastar.engines.plan import BlockPlan

_ENTRIES = {  # name: module, attribute
    "reference": ("fastar.engines.reference", "REFERENCE"),
    "sdpa": ("fastar.engines.sdpa", "SDPA"),
    "augmented": ("fastar.engines.sdpa", "AUGMENTED"),
    "flex": ("fastar.engines.flex", "FLEX"),
    "fa4": ("fastar.engines.fa4", "FA4"),
    "flashinfer": ("fastar.engines.flashinfer", "FLASHINFER"),
    "cudnn": ("fastar.engines.cudnn", "CUDNN"),
}


@dataclass(frozen=True)
class AttentionCall:
    """One attention call after validation; all tensors on one device.

    Attributes:
        q: [B, H, Lq, D]. k: [B, H, Lk, D]. v: [B, H, Lk, Dv]. One dtype.
        log_count: [B, H, Lk] float32 added to the logits of a key, -inf for an empty slot; None: all zero.
        plan: executed block pairs; None means all.
        return_lse: whether the log-sum-exp of each query's logits is wanted.
        head_dim: the true head dim if q and k carry the log-counts in extra coordinates; else None.
        lengths: [B, H] int32, how many keys each head has, for engines that take them; None: all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_count: Tensor | None
    plan: BlockPlan | None
    return_lse: bool
    head_dim: int | None = None
    lengths: Tensor | None = None

    @property
    def scale(self) -> float:
        """Softmax scale 1 / sqrt(D), of the true head dim."""
        head_dim = self.q.shape[-1] if self.head_dim is None else self.head_dim
        return float(head_dim**-0.5)


@dataclass(frozen=True)
class Engine:
    """A way to execute attention, and what it can do.

    Attributes:
        name: the name it is chosen by.
        run: executes a call; returns out [B, H, Lq, Dv] in q's dtype, and lse [B, H, Lq] float32 or None.
        devices: device types it runs on; None means any.
        dtypes: tensor dtypes it takes; None means any floating dtype.
        lse_devices: device types on which it returns the log-sum-exp.
        takes_log_count, takes_plan: whether it takes those arguments.
        takes_lengths: whether it reads key lengths as they are; for others they become log-counts of -inf.
        key_multiple: of what the width of log-counted keys is to be a multiple (see `key_width`).
        counts_in_keys: device types on which log-counts cost least inside the keys, so that a rollout keeps them there.
        missing: given a device, what the machine lacks to run it, or None.
        limits: given a call, which further constraint of the engine it breaks, or None.
    """

    name: str
    run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    lse_devices: frozenset[str] | None = frozenset()
    takes_log_count: bool = True
    takes_plan: bool = True
    takes_lengths: bool = False
    key_multiple: int = 8
    counts_in_keys: frozenset[str] = frozenset()
    missing: Callable[[torch.device], str | None] = lambda device: None
    limits: Callable[[AttentionCall], str | None] = lambda call: None

    def key_width(self, head_dim: int) -> int:
        """Width at which log-counted keys of `head_dim` numbers are stored for this engine."""
        return augmented_width(head_dim, self.key_multiple)

    def unfit_for_device(self, device: torch.device) -> str | None:
        """Why the engine cannot run on `device` at all, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device.type}"
        return self.missing(device)

    def unfit_for(self, call: AttentionCall) -> str | None:
        """Why the engine cannot execute `call`, or None."""
        if self.dtypes is not None and call.q.dtype not in self.dtypes:
            return f"it does not take {call.q.dtype}"
        if call.log_count is not None and not self.takes_log_count:
            return "it takes no log_count"
        if call.plan is not None and not self.takes_plan:
            return "it takes no block plan"
        if call.return_lse and self.lse_devices is not None and call.q.device.type not in self.lse_devices:
            return f"it returns no log-sum-exp on {call.q.device.type}"
        return self.limits(call)


def names() -> list[str]:
    """Names of all registered engines."""
    return sorted(_ENTRIES)


def get(name: str) -> Engine:
    """The engine called `name`.

    Raises:
        ValueError: if there is none of that name; the message lists the choices.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown attention engine '{name}': choose one of auto, {', '.join(names())}")
    module, attribute = _ENTRIES[name]
    engine = getattr(import_module(module), attribute)
    assert isinstance(engine, Engine)
    return engine


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability, or None where there is no such device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def resolve(name: str, device: torch.device | str, call: AttentionCall | None = None) -> str:
    """The engine that `name` means on `device`; `auto` is decided here, once, so that it can be recorded.

    Args:
        call: what the calls to come are like (`example_call`), for `auto` to choose by; None: only the device counts.

    Raises:
        ValueError: if the name is unknown, or the engine cannot run on that device (with the reason).
    """
    device = torch.device(device)
    if name == "auto":
        from fastar.engines.auto import choose

        chosen, passed = choose(device, call)
        if chosen is None:
            reasons = "; ".join(f"{engine}: {reason}" for engine, reason in passed.items())
            raise ValueError(
                f"engine=auto finds none for these calls ({reasons}): name one of {', '.join(names())}"
            )
        return chosen
    reason = get(name).unfit_for_device(device)
    if reason is not None:
        raise ValueError(f"attention engine '{name}' cannot run here: {reason}")
    return name
