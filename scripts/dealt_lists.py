"""Block-sparse attention of one chunk of Wan2.1-1.3B whose last, partial wave of tiles shares out its lists of blocks.

    python scripts/dealt_lists.py [RECORD.json]       # a GPU with FlashAttention-4

A quarter of the key blocks, at random, with and without log-counts; 1 part: no list is shared out. What
`fastar.engines.waves.split_of` decides for lists is read off here.
"""

import sys
from pathlib import Path

import torch

from fastar.benchmark.attention_calls import Geometry
from fastar.benchmark.engines import benchmark
from fastar.engines import fa4, waves
from fastar.results.files import write_json
from fastar.results.provenance import code_of, environment

KEYS, PARTS, DENSITY = (16_384, 32_760, 46_080, 65_536, 131_040), (1, 2, 3, 5, 11), 0.25
TILE = 128


def whole_waves(geometry: Geometry, processors: int) -> int:
    """The most of the first queries whose tiles need no more waves of so many processors than are full."""
    full = -(-geometry.queries // TILE) * geometry.heads // processors
    return full * processors // geometry.heads * TILE


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
    made = environment(device=gpu)
    card = {
        "device": made["device"],
        "torch": torch.__version__,
        "code": code_of(made),
        "day": made["time"][:10],
    }
    card |= {"dtype": "bfloat16", "queries": geometry.queries}
    if len(sys.argv) > 1:
        write_json(Path(sys.argv[1]), {"card": card, "environment": made, "rows": rows})


if __name__ == "__main__":
    main()
