"""Attention that fills a GPU to the end: the queries of a last, partial wave of tiles share it among parts of the keys.

A kernel that gives each tile of queries to one processor takes whole waves: a chunk of Wan2.1-1.3B (4,680 queries, 12
heads) is 444 tiles of 128, on an H100's 132 processors 3.4 waves' work in the time of 4. Here the tiles of three waves
run as they are, and those that are left over as several shorter ones, each over a part of the keys, which are joined by
their log-sum-exps: flash decoding's split of the keys, for what does not fill a wave alone.

One H100, FlashAttention-4, 2026-11-27: dense calls of such a chunk run at 741 to 751 TFLOP/s over 32,760 keys and at
732 to 768 over 131,040, whole at 657 to 664 and 673. The lists of block plans are dealt out in the same way: a quarter
of 32,760 keys takes 0.39 ms for 0.41, of 131,040 1.44 for 1.57 (`scripts/dealt_lists.py`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastar.interpreter import interpreted

MOST_SPLITS = 16

# What a wave costs beside its keys, and what two more kernels cost, in keys of a wave: on an H100, where 1,000 keys of
# 132 tiles of 128 queries take 11 us (FlashAttention-4 4.0.0b36, heads of 128). Keys of smaller tiles and heads take
# less.
_WAVE, _KERNELS, _MEASURED = 700, 2000, 128 * 128
_SURE = 0.97  # what is estimated to save less is left alone


@cache
def split_of(
    queries: int, keys: int, heads: int, processors: int, tile: int, width: int, *, listed: bool = False
) -> tuple[int, int] | None:
    """How many of the first queries run over all keys at once, and over how many parts of the keys the others do.

    None: all queries over all keys, which is estimated to be no slower.

    Args:
        queries, keys, heads: of the call, of one batch entry.
        processors: of the GPU, each of which takes one tile at a time.
        tile: its queries. width: numbers of a head.
        listed: keys are those of blocks in lists, whose parts are to fit into one wave: in more, each of which reads
            blocks of its own, they are slower than estimated.
    """
    tiles, cheap = -(-queries // tile), max(1, _MEASURED / (tile * width))
    wave, kernels = cheap * _WAVE, cheap * _KERNELS

    def waves(count: int) -> int:
        return -(-count * heads // processors)

    best, chosen = _SURE * waves(tiles) * (keys + wave), None
    for whole in reversed(range(tiles)):  # of two that cost the same that which leaves less to join
        for splits in range(2, MOST_SPLITS + 1):
            last = waves((tiles - whole) * splits)
            if listed and last > 1:
                break
            cost = waves(whole) * (keys + wave) + kernels + last * (-(-keys // splits) + wave)
            if cost < best:
                best, chosen = cost, (whole * tile, splits)
    return chosen


def boundaries(keys: int, splits: int, device: torch.device) -> Tensor:
    """int32 [splits + 1], where equal parts of the keys begin and end; made on the device, without a wait, and kept.

    What is made while a graph is captured belongs to that graph, and is not.
    """
    kept = _BOUNDARIES.get((keys, splits, device))
    if kept is not None:
        return kept
    with torch.inference_mode(False):
        made = torch.arange(splits + 1, dtype=torch.int32, device=device) * keys // splits
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _BOUNDARIES[keys, splits, device] = made
    return made


_BOUNDARIES: dict[tuple[int, int, torch.device], Tensor] = {}


def join(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write attention over all keys to out [H, n, D] and lse [H, n], given that over parts of them.

    Args:
        parts: [splits, n, H, D], contiguous. part_lse: float32 [splits, H, n], contiguous, natural logarithms.
        out, lse: last dimensions contiguous; lse float32.
    """
    from fastar.engines.kernels import join_parts

    splits, n, heads, width = parts.shape
    assert parts.is_contiguous() and part_lse.is_contiguous() and out.stride(2) == lse.stride(1) == 1
    assert parts.device.type == "cuda" or interpreted()
    rows = 16
    with torch.cuda.device_of(parts):  # Triton launches on the current device
        join_parts[(-(-n // rows), heads)](
            parts, part_lse, out, lse, n, heads, splits, *out.stride()[:2], lse.stride(0),
            D=width, WIDTH=1 << (width - 1).bit_length(), ROWS=rows,
        )  # fmt: skip
