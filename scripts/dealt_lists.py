"""Block-sparse attention of one chunk of Wan2.1-1.3B whose last, partial wave of tiles shares out its lists of blocks.

    python scripts/dealt_lists.py [RECORD.json]       # a GPU with FlashAttention-4

A quarter of the key blocks, at random, with and without log-counts; 1 part is the call as it comes. What
`fastar.engines.waves.split_of` decides for lists is read off here.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from fastar.benchmark.attention_calls import Geometry
from fastar.benchmark.engines import benchmark
from fastar.engines import fa4, waves
from fastar.results.files import write_json

KEYS, PARTS, DENSITY = (16_384, 32_760, 46_080, 65_536, 131_040), (1, 2, 3, 5, 11), 0.25
TILE = 128


def whole_waves(geometry: Geometry, processors: int) -> int:
    """The first queries, whose tiles fill waves of so many processors."""
    tiles = -(-geometry.queries // TILE)
    return max(n for n in range(tiles) if (n * geometry.heads) % processors == 0) * TILE


def main() -> None:
    """Time all; one line each."""
    if not torch.cuda.is_available():
        sys.exit("this times kernels of a GPU, and there is none here: run it on a GPU with FlashAttention-4")
    gpu, geometry, rows = torch.device("cuda"), Geometry(), []
    whole = whole_waves(geometry, torch.cuda.get_device_properties(gpu).multi_processor_count)
    for parts in PARTS:

        def split(*sizes: int, listed: bool, parts: int = parts) -> tuple[int, int] | None:
            if not listed:
                return waves.split_of(*sizes, listed=False)
            return None if parts == 1 else (whole, parts)

        fa4.split_of = split  # type: ignore[assignment]
        for row in benchmark(["fa4"], KEYS, [DENSITY], geometry, device=gpu, dtype=torch.bfloat16, repeats=9):
            rows.append({"parts": parts} | row)
            print({name: rows[-1][name] for name in ("parts", "kind", "keys", "ms", "of_dense", "reason")})
    card: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if len(sys.argv) > 1:
        write_json(Path(sys.argv[1]), {"card": card | {"queries": geometry.queries}, "rows": rows})


if __name__ == "__main__":
    main()
