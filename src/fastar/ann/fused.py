"""Matchers whose search is one fused kernel (`fastar.ann.kernels`), for the GPU: no score ever reaches memory.

They give the answers of their plain namesakes in `exact`, `lsh` and `quantized`, and `TritonBinaryMatcher` one of its
own. Nothing in them waits for the device, and all shapes follow from those of the arguments.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from itertools import combinations
from typing import get_args

import torch
from torch import Tensor

from fastar.ann.base import Excluded, Matcher, Metric, check_features, seeded_planes
from fastar.ann.codes import codes_of
from fastar.ann.exact import no_match
from fastar.ann.launch import BUCKET_TILES, CODE_TILE, FusedSearch, Precision, Tile, check_triton, tile_for
from fastar.ann.lsh import check_lsh, mean_key
from fastar.ann.quantized import check_code_bits, code_scale, codes_at


class _FusedMatcher(Matcher):
    """What the matchers below share."""

    def __init__(self) -> None:
        check_triton()

    def exact(self) -> Matcher:
        return TritonMatcher(precision="bfloat16")

    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        valid: Tensor | None = None,
        excluded: Excluded | None = None,
        metric: Metric = "dot",
    ) -> tuple[Tensor, Tensor]:
        check_features(queries, keys, valid)
        if keys.shape[1] == 0 or queries.shape[1] == 0:
            return no_match(queries)
        with torch.cuda.device_of(queries):  # Triton launches on the current device
            return self._search(queries, keys, valid, excluded, metric)

    @abstractmethod
    def _search(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, excluded: Excluded | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        """`nearest` of arguments that were checked; there are queries and keys."""


class TritonMatcher(_FusedMatcher):
    """Exact search by one kernel that streams over the keys.

    Args:
        precision: of products of float32 features: `ieee` float32; `tf32x3`, three tensor-core products that come
            close to it; `tf32`, one; `bfloat16`: features are rounded to that first, under `euclidean` about the mean
            key. Features of 16 bits are always multiplied exactly. Sums are float32.
        tile: None for one that suits the dtype.
        splits: into how many parts the keys are split; None for as many as fill the device. No answer depends on it.

    Raises:
        ValueError: if Triton is not installed; at the first search, if the tensors are not on a GPU.
    """

    def __init__(
        self, *, precision: Precision = "ieee", tile: Tile | None = None, splits: int | None = None
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(
                f"unknown precision {precision!r}: choose one of {', '.join(get_args(Precision))}"
            )
        super().__init__()
        self.precision, self.tile, self.splits = precision, tile, splits

    def exact(self) -> Matcher:
        return self

    def _search(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, excluded: Excluded | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        queries, keys = _rounded(queries, keys, valid, metric, self.precision)
        tile = self.tile or tile_for(keys)
        search = FusedSearch(queries, keys, valid, excluded, metric, tile, self.splits)
        return search.finish(search.stream(self.precision))


class TritonQuantizedMatcher(_FusedMatcher):
    """`QuantizedMatcher` with int8 codes and int32 sums, which tensor cores do at twice the rate of 16-bit floats.

    Args:
        bits: 2 to 8; codes are held as int8 whatever it is.
        tile, splits: see `TritonMatcher`.
    """

    def __init__(self, *, bits: int = 8, tile: Tile | None = None, splits: int | None = None) -> None:
        check_code_bits(bits)
        super().__init__()
        self.bits, self.tile, self.splits = bits, tile, splits

    def _search(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, excluded: Excluded | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        centre = keys.mean(1, keepdim=True)
        keys = keys - centre
        queries = queries - centre if metric == "euclidean" else queries
        scales = [code_scale(x, self.bits) for x in (queries, keys)]
        queries, keys = (
            codes_at(x, scale, self.bits).to(torch.int8)
            for x, scale in zip((queries, keys), scales, strict=True)
        )
        search = FusedSearch(queries, keys, valid, excluded, metric, self.tile or tile_for(keys), self.splits)
        search.rescale(*(scale.flatten().float() for scale in scales))
        return search.finish(search.stream("ieee"))


class TritonLSHMatcher(_FusedMatcher):
    """`LSHMatcher` that compares candidates only: both sides are sorted by bucket, table by table.

    Args:
        bits, tables, radius, seed: see `LSHMatcher`; the probes of a table are all codes within `radius`.
        precision, tile: see `TritonMatcher`.
    """

    def __init__(
        self,
        *,
        bits: int = 8,
        tables: int = 8,
        radius: int = 1,
        seed: int = 0,
        precision: Precision = "ieee",
        tile: Tile | None = None,
    ) -> None:
        check_lsh(bits, tables, radius)
        super().__init__()
        self.bits, self.tables, self.radius, self.seed = bits, tables, radius, seed
        self.precision, self.tile = precision, tile

    def _search(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, excluded: Excluded | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        centre = mean_key(keys, valid)
        planes = seeded_planes(self.seed, keys.shape[2], self.tables * self.bits, like=keys)
        key_codes = self._codes((keys - centre) @ planes)
        query_codes = self._codes((queries - centre if metric == "euclidean" else queries) @ planes)
        queries, keys = _rounded(queries, keys, valid, metric, self.precision)
        tile = self.tile or BUCKET_TILES[keys.element_size()]
        search = FusedSearch(queries, keys, valid, excluded, metric, tile)
        flips = _flips(self.bits, self.radius, keys.device)
        return search.finish(search.buckets(query_codes, key_codes, flips, self.precision))

    def _codes(self, side: Tensor) -> Tensor:
        """Sides of the hyperplanes [N, n, tables * bits] as codes int32 [tables, N, n]."""
        codes = codes_of(side.unflatten(-1, (self.tables, self.bits)))
        return codes.to(torch.int32).movedim(-1, 0).contiguous()


class TritonBinaryMatcher(_FusedMatcher):
    """The key whose signs under random hyperplanes differ least from the query's (Charikar 2002), by counting bits.

    Sides are taken as `LSHMatcher` takes them: keys about their mean, queries too under `euclidean`. The score is that
    of the codes: minus the bits that differ (`euclidean`), or those that agree less those that differ (`dot`).

    Args:
        bits: of a code, a multiple of 32.
        seed: of the hyperplanes.
        tile, splits: see `TritonMatcher`.
    """

    def __init__(
        self, *, bits: int = 256, seed: int = 0, tile: Tile | None = None, splits: int | None = None
    ) -> None:
        if bits < 32 or bits % 32:
            raise ValueError(f"bits must be a positive multiple of 32, got {bits}")
        super().__init__()
        self.bits, self.seed, self.tile, self.splits = bits, seed, tile, splits

    def _search(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, excluded: Excluded | None, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        centre = mean_key(keys, valid)
        planes = seeded_planes(self.seed, keys.shape[2], self.bits, like=keys)
        key_codes = self._codes((keys - centre) @ planes)
        query_codes = self._codes((queries - centre if metric == "euclidean" else queries) @ planes)
        # nothing to add to a score but -inf where a key is not valid
        search = FusedSearch(
            query_codes, key_codes, valid, excluded, "dot", self.tile or CODE_TILE, self.splits
        )
        index, score = search.finish(search.codes())
        return index, score if metric == "euclidean" else self.bits + 2 * score

    @staticmethod
    def _codes(side: Tensor) -> Tensor:
        """Sides of the hyperplanes [N, n, bits] as codes int32 [N, n, bits / 32]."""
        words = codes_of(side.unflatten(-1, (-1, 32)))
        return (words - ((words >> 31) << 32)).to(torch.int32)  # the top bit is the sign


def _rounded(
    queries: Tensor, keys: Tensor, valid: Tensor | None, metric: Metric, precision: str
) -> tuple[Tensor, Tensor]:
    """Features in the dtype they are multiplied in."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    if dtype in (torch.bfloat16, torch.float16):
        return queries.to(dtype), keys.to(dtype)
    if precision == "bfloat16":
        if metric == "euclidean":  # distances do not change, but smaller numbers are rounded less
            centre = mean_key(keys, valid)
            queries, keys = queries - centre, keys - centre
        return queries.bfloat16(), keys.bfloat16()
    return queries.float(), keys.float()


@cache
@torch.inference_mode(False)  # for callers of either mode
def _flips(bits: int, radius: int, device: torch.device) -> Tensor:
    """All patterns of `bits` bits with at most `radius` set, int32; kept, as a copy would make the host wait."""
    chosen = [
        sum(1 << bit for bit in few) for size in range(radius + 1) for few in combinations(range(bits), size)
    ]
    return torch.tensor(chosen, dtype=torch.int32, device=device)
