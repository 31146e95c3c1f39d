"""What experiments/benchmark.py does: the card, the table for people, and one line of JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from fastar import engines
from fastar.benchmark.engines import benchmark
from fastar.benchmark.timing import matmul_flops
from fastar.cache.base import check_choice
from fastar.cache.slots import DTYPES
from fastar.compare.command import check_writable, wide_console
from fastar.compare.session import best_device
from fastar.results.files import write_json
from fastar.results.provenance import code_of, environment
from fastar.results.tables import to_rich


def run(config: DictConfig) -> dict[str, Any]:
    """Measure, show, and write `engines.json` to `output`.

    Raises:
        ValueError: an unknown dtype, device or engine, or a folder that cannot be written.
    """
    check_choice("dtype", config.dtype, tuple(DTYPES))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_writable(Path(config.output), "output")
    device = torch.device(best_device() if config.device == "auto" else config.device)
    dtype, console = DTYPES[config.dtype], wide_console()
    names = list(config.engines) if config.engines is not None else engines.names()
    for name in names:
        engines.get(name)  # unknown ones are told of before minutes of measuring
    geometry = instantiate(config.geometry)

    made = environment(device=device, seeds=[config.seed])
    peak = matmul_flops(device, dtype, size=config.matmul_size, repeats=config.repeats) / 1e12
    card = {
        "device": made["device"],
        "torch": made["packages"].get("torch"),
        "code": code_of(made),
        "day": made["time"][:10],
        "dtype": config.dtype,
        "matmul_tflops": peak,
        "geometry": geometry.__dict__,
        "kept": config.kept,
    }
    console.print(
        f"{card['device']}, torch {card['torch']}, code {card['code']}, {card['day']}, {config.dtype}: products of "
        f"{config.matmul_size} x {config.matmul_size} matrices run at {peak:.3g} TFLOP/s, the ceiling. {geometry}",
        highlight=False,
        soft_wrap=True,
    )
    rows = list(
        benchmark(
            names, list(config.keys_per_call), list(config.densities), geometry,
            device=device, dtype=dtype, repeats=config.repeats, seed=config.seed, kept=config.kept,
        )
    )  # fmt: skip
    for row in rows:
        row["ceiling_share"] = None if row["tflops"] is None else row["tflops"] / peak
    console.print(to_rich(shown(rows), title="attention engines: median of the repeats"))
    result = {"card": card, "environment": made, "rows": rows}
    write_json(Path(config.output) / "engines.json", result)
    console.print(json.dumps({"card": card, "rows": rows}), highlight=False, soft_wrap=True)
    return result


def shown(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table for people: one line a row, numbers as text."""

    def text(row: dict[str, Any]) -> dict[str, str]:
        named = {
            "engine": row["engine"],
            "call": row["kind"],
            "keys": f"{row['keys']:,}",
            "density": f"{row['density']:.2f}",
        }
        if row["reason"] is not None:
            return named | {"ms": "–", "note": str(row["reason"])}
        return named | {
            "ms": f"{row['ms']:.3g} [{row['ms_low']:.3g}, {row['ms_high']:.3g}]",
            "TFLOP/s": f"{row['tflops']:.3g}",
            "of ceiling": f"{row['ceiling_share']:.0%}",
            "of own dense": f"{row['of_dense']:.2f}" if row["of_dense"] else "–",
            "of best dense": f"{row['of_best']:.2f}" if row["of_best"] else "–",
            "error": f"{row['error']:.1e}",
        }

    return pd.DataFrame([text(row) for row in rows]).fillna("–")
