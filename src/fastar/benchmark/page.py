"""What every mode of the benchmark prints and writes: a card before measuring, tables, one line of JSON last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from fastar.cache.base import check_choice
from fastar.cache.slots import DTYPES
from fastar.compare.command import check_writable, wide_console
from fastar.compare.session import best_device
from fastar.results.files import atomic, write_json
from fastar.results.provenance import code_of, environment
from fastar.results.tables import to_rich

Rows = list[dict[str, Any]]


class Page:
    """The output of one command.

    Args:
        config: mode, output, device, dtype, threads and seed are read.

    Raises:
        ValueError: an unknown dtype or device, or a folder that cannot be written.
    """

    def __init__(self, config: DictConfig) -> None:
        check_choice("dtype", config.dtype, tuple(DTYPES))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.output, self.mode = Path(config.output), str(config.mode)
        check_writable(self.output, "output")
        self.device = torch.device(best_device() if config.device == "auto" else config.device)
        self.dtype, self.console = DTYPES[config.dtype], wide_console()
        self.environment = environment(device=self.device, seeds=[config.seed])
        self._card: dict[str, Any] = {}

    def card(self, stated: Mapping[str, Any], sentence: str) -> None:
        """Say what is measured on, and the ceiling, before anything is."""
        made = self.environment
        self._card = {
            "mode": self.mode,
            "device": made["device"],
            "torch": made["packages"].get("torch"),
            "code": code_of(made),
            "day": made["time"][:10],
            "dtype": str(self.dtype).removeprefix("torch."),
            **stated,
        }
        c = self._card
        about = f"{c['device']}, torch {c['torch']}, code {c['code']}, {c['day']}, {c['dtype']}: "
        self.console.print(about + sentence, highlight=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        """A line for people."""
        self.console.print(sentence, highlight=False, soft_wrap=True)

    def show(self, lines: Sequence[Mapping[str, str]], title: str) -> None:
        """A table for people: one mapping a line, numbers as text; what is missing is a dash."""
        self.console.print(to_rich(pd.DataFrame(lines).fillna("–"), title=title))

    def keep(self, rows: Rows, curves: Mapping[str, Rows]) -> dict[str, Any]:
        """Write `<mode>.json` and a parquet file for each of `curves`: what there is, should the command be ended."""
        result = {"card": self._card, "environment": self.environment, "rows": rows}
        write_json(self.output / f"{self.mode}.json", result)
        for name, curve in curves.items():
            with atomic(self.output / f"{name}.parquet") as part:
                pd.DataFrame(curve).to_parquet(part, index=False)
        return result

    def finish(self, rows: Rows, curves: Mapping[str, Rows]) -> dict[str, Any]:
        """Keep all of it, print the line of JSON, return what is in the file."""
        result = self.keep(rows, curves)
        self.console.print(json.dumps({"card": self._card, "rows": rows}), highlight=False, soft_wrap=True)
        return result
