"""How the kernels of `fastar.ann.kernels` are launched: what all matchers made of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastar.ann.base import Excluded, Metric
from fastar.interpreter import interpreted

Precision = Literal["ieee", "tf32x3", "tf32", "bfloat16"]
_WAVES = 2  # programs wanted for every multiprocessor before keys are no longer split


@dataclass(frozen=True)
class Tile:
    """Sizes of a kernel's tiles (powers of two, at least 16; `width` at least 32 for int8) and how it is compiled.

    `width` features are multiplied at a time; features that fit in it are read once for each tile of queries.
    """

    queries: int
    keys: int
    width: int
    warps: int
    stages: int


# Chosen so that they compile for sm_90 without spilled registers (tests/ann/compile_kernels.py), not tuned on a GPU.
TILES = {  # by bytes a number
    4: Tile(128, 64, 32, 8, 3),
    2: Tile(128, 64, 256, 8, 3),
    1: Tile(128, 64, 256, 8, 3),
}
WIDE_TILE = Tile(64, 64, 64, 8, 3)  # of fewer than 4 bytes a number, where the queries do not fit
BUCKET_TILES = {4: Tile(64, 64, 32, 8, 2), 2: Tile(64, 64, 64, 8, 2)}  # buckets are short
CODE_TILE = Tile(64, 64, 32, 8, 2)


def tile_for(features: Tensor) -> Tile:
    """The tile for queries or keys [N, n, d]."""
    tile = TILES[features.element_size()]
    return WIDE_TILE if tile.width < features.shape[2] and features.element_size() < 4 else tile


class FusedSearch:
    """One search: its tensors made contiguous, its sizes, and the launches of its kernels."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        valid: Tensor | None,
        excluded: Excluded | None,
        metric: Metric,
        tile: Tile,
        splits: int | None = None,
    ) -> None:
        check_device(queries.device)
        self.queries, self.keys = queries.contiguous(), keys.contiguous()
        self.metric = metric
        self.problems, self.n, self.width = queries.shape
        self.m = keys.shape[1]
        # no wider than the features, rounded up
        self.tile = replace(tile, width=min(tile.width, max(32, _power_of_two(self.width))))
        self.splits = splits or _splits(self.problems, self.n, self.m, self.tile, queries.device)
        shape = (self.problems, self.n)
        self.excluded = None
        if excluded is not None:
            sides = [side.to(torch.int32).expand(shape) for side in excluded]
            self.excluded = torch.stack(sides)
        self.offset = torch.zeros(self.problems, self.m, device=keys.device)
        self.query_square = torch.zeros(shape, device=keys.device)  # times -1/2
        self.scale: Tensor | None = None
        if metric == "euclidean":
            self._halve_squares(self.keys, valid, self.offset)
            self._halve_squares(self.queries, None, self.query_square)
        elif valid is not None:
            self.offset.masked_fill_(~valid, -torch.inf)

    def rescale(self, query_scale: Tensor, key_scale: Tensor) -> None:
        """The features are codes: queries stand for query_scale [N] times them, keys for key_scale [N] times them."""
        self.scale = query_scale * key_scale
        self.offset *= key_scale.square()[:, None]
        self.query_square *= query_scale.square()[:, None]

    def stream(self, precision: str) -> tuple[Tensor, Tensor]:
        """Partials [splits, N, n] over parts of the keys."""
        scores, indices, span = self._partials()
        kernels().nearest[self._grid()](
            self.queries, self.keys, self.offset, self._or_unused(self.scale), self._or_unused(self.excluded),
            scores, indices, self.problems, self.n, self.m, span,
            self.n * self.width, self.m * self.width, self.m, self.n,
            D=self.width, Q=self.tile.queries, K=self.tile.keys, WIDTH=self.tile.width,
            INTEGER=self.scale is not None, EXCLUDE=self.excluded is not None, **self._product(precision),
        )  # fmt: skip
        return scores, indices

    def codes(self) -> tuple[Tensor, Tensor]:
        """Partials [splits, N, n] over parts of the keys, of binary codes."""
        scores, indices, span = self._partials()
        kernels().nearest_code[self._grid()](
            self.queries, self.keys, self.offset, self._or_unused(self.excluded),
            scores, indices, self.problems, self.n, self.m, span,
            W=self.width, Q=self.tile.queries, K=self.tile.keys, EXCLUDE=self.excluded is not None,
            num_warps=self.tile.warps, num_stages=self.tile.stages,
        )  # fmt: skip
        return scores, indices

    def buckets(
        self, query_codes: Tensor, key_codes: Tensor, flips: Tensor, precision: str
    ) -> tuple[Tensor, Tensor]:
        """Partials [tables, N, n] over hash tables, of codes int32 [tables, N, n or m]."""
        self.splits = query_codes.shape[0]
        scores, indices, _ = self._partials()
        query_code, query_order = query_codes.sort(dim=-1, stable=True)
        key_code, key_order = key_codes.sort(dim=-1, stable=True)
        kernels().nearest_in_buckets[self._grid()](
            self.queries, self.keys, self.offset,
            query_order.to(torch.int32), query_code, key_order.to(torch.int32), key_code,
            flips, self._or_unused(self.excluded), scores, indices,
            self.problems, self.n, self.m, len(flips), self.m.bit_length(),
            D=self.width, Q=self.tile.queries, K=self.tile.keys, WIDTH=self.tile.width,
            EXCLUDE=self.excluded is not None, **self._product(precision),
        )  # fmt: skip
        return scores, indices

    def finish(self, partials: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What `Matcher.nearest` returns."""
        rows, block = self.problems * self.n, 256
        score = torch.empty(self.problems, self.n, device=self.keys.device)
        index = torch.empty(self.problems, self.n, dtype=torch.long, device=self.keys.device)
        kernels().merge_partials[(_blocks(rows, block),)](
            *partials, score, index, rows, len(partials[0]), BLOCK=block
        )
        if self.metric == "euclidean":
            score = (2 * (score + self.query_square)).clamp_max_(0)
        return index, score

    def _partials(self) -> tuple[Tensor, Tensor, int]:
        """Room for partials, and the keys of each: whole tiles, so that a tile never straddles two parts."""
        span = _blocks(_blocks(self.m, self.tile.keys), self.splits) * self.tile.keys
        shape, device = (self.splits, self.problems, self.n), self.keys.device
        return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device), span

    def _grid(self) -> tuple[int, int, int]:
        return (_blocks(self.n, self.tile.queries), self.splits, self.problems)

    def _product(self, precision: str) -> dict[str, Any]:
        exact = self.queries.dtype != torch.float32
        return {
            "UPCAST": interpreted(),
            "PRECISION": "ieee" if exact else precision,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def _or_unused(self, tensor: Tensor | None) -> Tensor:
        """A kernel's argument that it does not read must still be a tensor."""
        return self.offset if tensor is None else tensor

    def _halve_squares(self, x: Tensor, valid: Tensor | None, out: Tensor) -> None:
        rows, block = out.numel(), 64
        flags = out if valid is None else valid.contiguous().view(torch.uint8)
        kernels().halved_squares[(_blocks(rows, block),)](
            x, flags, out, rows, D=self.width, BLOCK=block, WIDTH=self.tile.width, MASKED=valid is not None
        )


def nearest_allowed(
    queries: Tensor, keys: Tensor, offset: Tensor, excluded: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """The key with the largest q.k + offset of every query, -1 if none is allowed: int32 [N, n].

    For callers who hold features as the kernel wants them: nothing is copied, rounded or checked.

    Args:
        queries, keys: [N, n, d] and [N, m, d], rows next to one another; the problems may lie apart.
        offset: float32 [N, m], in the same way.
        excluded: int32 [2, N or 1, n], contiguous: keys low .. high - 1 that a query may not match; None: all may be.
        tile: None for one that suits the dtype.
    """
    (problems, n, width), m = queries.shape, keys.shape[1]
    tile = tile or tile_for(keys)
    tile = replace(tile, width=min(tile.width, max(32, _power_of_two(width))))
    splits = _splits(problems, n, m, tile, keys.device)
    span = _blocks(_blocks(m, tile.keys), splits) * tile.keys
    scores = torch.empty(splits, problems, n, device=keys.device)
    indices = torch.empty(splits, problems, n, dtype=torch.int32, device=keys.device)
    kernels().nearest[(_blocks(n, tile.queries), splits, problems)](
        queries, keys, offset, offset, offset if excluded is None else excluded, scores, indices, problems, n, m, span,
        queries.stride(0), keys.stride(0), offset.stride(0), 0 if excluded is None or excluded.shape[1] == 1 else n,
        D=width, Q=tile.queries, K=tile.keys, WIDTH=tile.width, INTEGER=False, EXCLUDE=excluded is not None,
        UPCAST=interpreted(), PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits == 1:
        return indices[0]
    best = torch.empty(problems, n, device=keys.device)
    index = torch.empty(problems, n, dtype=torch.long, device=keys.device)
    kernels().merge_partials[(_blocks(problems * n, 256),)](
        scores, indices, best, index, problems * n, splits, BLOCK=256
    )
    return index.to(torch.int32)


def _splits(problems: int, n: int, m: int, tile: Tile, device: torch.device) -> int:
    """Into how many parts keys are split to fill the device."""
    wanted = _blocks(_WAVES * _multiprocessors(device), problems * _blocks(n, tile.queries))
    return min(wanted, _blocks(m, tile.keys))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.ann import kernels as module

    return module


def check_triton() -> None:
    """Raise a ValueError unless Triton is installed."""
    if find_spec("triton") is None:
        raise ValueError("this matcher needs Triton: install triton, or choose ann=exact, lsh or quantized")


def check_device(device: torch.device) -> None:
    """Raise a ValueError unless Triton can work on tensors of `device`."""
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"this matcher runs on a GPU, not on {device.type}: choose ann=exact, lsh or quantized (or set "
            "TRITON_INTERPRET=1 to try it slowly)"
        )
