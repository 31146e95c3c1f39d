"""The Triton kernels of the engines that no other file tests: moving tokens; and all of them, compiled for a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastar.engines.rows import gathered, scattered

from .conftest import Draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [24, 144])
def test_tokens_are_put_in_order_and_back(
    draw: Draw, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Slices of buffers and [B, L, H, D] in memory, too."""
    draw = dataclasses.replace(draw, device=device, dtype=dtype)
    order = draw.order(2, 3, 37)
    for x in (
        draw.normal(2, 3, 37, width),
        draw.normal(2, 3, 50, width)[:, :, :37],
        draw.normal(2, 37, 3, width).transpose(1, 2),
    ):
        inside = gathered(x, order)
        assert torch.equal(inside, x.gather(2, order[..., None].expand_as(x)))
        back = scattered(inside, order)
        assert torch.equal(back, x) and back.transpose(1, 2).is_contiguous()
        assert gathered(x, None) is x and scattered(x, None) is x


def test_lists_of_blocks_are_made_once(draw: Draw, device: torch.device) -> None:
    plan = dataclasses.replace(draw, device=device).plan(2, 3, 50, 133, 16, 1)
    counts, indices = plan.listed()
    assert counts.dtype == indices.dtype == torch.int32 and plan.listed()[1] is indices
    read = torch.arange(indices.shape[3], device=device) < counts[..., None]
    mask = torch.zeros_like(plan.block_mask).scatter(3, indices.long(), read)
    assert torch.equal(mask, plan.block_mask)
    assert dataclasses.replace(plan, block_lists=(counts, indices)).listed()[1] is indices


def test_every_kernel_compiles_for_hopper(tmp_path: Path, repository: Path) -> None:
    """In a process without the interpreter, which replaces the compiler. Needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-m", "tests.engines.compile_kernels"]
    done = subprocess.run(
        command, env=environment, cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("shared memory") == 6
