"""Operations seen one by one as they are dispatched: memory they allocate, and those that would wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# On CUDA these wait for the device: numbers read back, shapes that depend on data, constants copied from the host.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_numpy", "masked_select", "argwhere",
    "unique_dim", "_unique", "_unique2", "unique_consecutive", "repeat_interleave", "bincount", "lift_fresh",
    "lift_fresh_copy",
}  # fmt: skip


READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # on the CPU these dispatch nothing


class _Reads(TorchFunctionMode):
    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.noted.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Watched(TorchDispatchMode):
    """While active, notes names of operations that would wait on CUDA, and bytes of memory that were new."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.bytes = 0
        self._reads = _Reads(self.waiting)

    def __enter__(self) -> Watched:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in WAITING or by_mask:
            self.waiting.append(str(func))
        known = {_memory(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        fresh = {_memory(x): x for x in tree_iter(out) if isinstance(x, Tensor) and _memory(x) not in known}
        self.bytes += sum(x.untyped_storage().nbytes() for x in fresh.values())
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
