"""Attention where heads keep unequally many slots: padded to the longest, each head its own, and read as it is stored.

    python scripts/ragged_heads.py [RECORD.json]       # a GPU with FlashAttention-4

Three heads of 60,000 slots beside nine of 10,000, one chunk of Wan2.1-1.3B's queries; random vectors.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastar import engines
from fastar.benchmark.timing import timed
from fastar.cache.slots import SlotFormat
from fastar.engines.augmented import augment_keys, augment_queries
from fastar.engines.packed import HeadRows, Packed, attend_packed
from fastar.results.files import write_json

HEAD_DIM, TOKENS, SLOTS = 128, 4680, [60_000] * 3 + [10_000] * 9


def calls(gpu: torch.device) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: each gives outputs [1, heads, TOKENS, HEAD_DIM]."""
    generator, heads = torch.Generator(gpu).manual_seed(0), len(SLOTS)
    lengths = torch.tensor([[TOKENS + slots for slots in SLOTS]], dtype=torch.int32, device=gpu)
    q, k, v = (
        torch.randn(1, heads, count, HEAD_DIM, generator=generator, device=gpu).bfloat16()
        for count in (TOKENS, TOKENS + max(SLOTS), TOKENS + max(SLOTS))
    )
    behind = torch.arange(k.shape[2], device=gpu) >= lengths[..., None]
    width, zeros = engines.key_width("fa4", HEAD_DIM), torch.zeros(behind.shape, device=gpu)
    wide, plain = augment_queries(q, width), augment_keys(k, zeros, width)
    masked = augment_keys(k, zeros.masked_fill(behind, -torch.inf), width)
    first = torch.tensor([[sum(SLOTS[:head]) for head in range(heads)]], device=gpu)
    rows = HeadRows(first, torch.tensor([SLOTS], dtype=torch.int32, device=gpu))
    own = [x[:, :, :TOKENS].contiguous() for x in (k, v)]

    def attend(keys: Tensor, lengths: Tensor | None = None) -> Tensor:
        return engines.attend(wide, keys, v, head_dim=HEAD_DIM, lengths=lengths, engine="fa4")[0]

    def stored(x: Tensor, bits: int) -> Packed:
        flat = torch.cat([x[0, head, TOKENS : TOKENS + slots] for head, slots in enumerate(SLOTS)])
        return Packed(*SlotFormat(bits, group=HEAD_DIM).pack("x", flat[None, None]).values())

    found = {"fa4 padded": lambda: attend(masked), "fa4 lengths": lambda: attend(plain, lengths)}
    for bits in (8, 4):
        parts = [stored(x, bits) for x in (k, v)]
        found[f"packed int{bits} rows"] = lambda parts=parts: attend_packed(q, *parts, *own, rows=rows)[0]  # type: ignore[misc]
    return found


def main() -> None:
    """Time all; one line each."""
    if not torch.cuda.is_available():
        sys.exit("this times kernels of a GPU, and there is none here: run it on a GPU with FlashAttention-4")
    gpu, rows = torch.device("cuda"), []
    pairs = TOKENS * sum(TOKENS + slots for slots in SLOTS)
    padded: Tensor | None = None
    for name, run in calls(gpu).items():
        out = run().float()
        padded = out if padded is None else padded
        ms = 1e3 * timed(run, device=gpu, repeats=7).median
        rate, error = 4 * pairs * HEAD_DIM / ms / 1e9, float((out - padded).norm() / padded.norm())
        rows.append({"how": name, "ms": ms, "tflops_of_live_pairs": rate, "distance_to_padded": error})
        print(rows[-1])
    card: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if len(sys.argv) > 1:
        write_json(Path(sys.argv[1]), {"card": card | {"slots": SLOTS, "queries": TOKENS}, "rows": rows})


if __name__ == "__main__":
    main()
