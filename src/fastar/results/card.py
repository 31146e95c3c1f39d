"""What a model card says of a backbone: the measures of experiments/evaluate.py beside their targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from fastar.results.provenance import code_of, environment
from fastar.results.tables import to_markdown

Row = Mapping[str, Any]

LINES: tuple[tuple[str, str, str, Callable[[Row], str]], ...] = (
    (
        "autoencoder_psnr",
        "autoencoder, PSNR",
        "at least 32 dB",
        lambda row: f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}] dB, {row['clips']} clips",
    ),
    (
        "next_frame",
        "next frame after true history, moving frames, PSNR",
        "at least 27 dB",
        lambda row: (
            f"{row['model_psnr']:.2f} dB, {row['clips']} clips; autoencoder {row['bound_psnr']:.2f} dB"
        ),
    ),
    (
        "next_frame",
        "the same above a copy of the last frame",
        "at least 4 dB",
        lambda row: _gain(row) + f"; copy {row['copy_psnr']:.2f} dB",
    ),
    (
        "action_following",
        "turns whose optical flow has the right sign",
        "at least 95 %",
        lambda row: f"{100 * row['share']:.1f} % of {row['tries']}",
    ),
    (
        "memory",
        "returning pixels: dense above a 16-frame window, PSNR",
        "at least 2 dB, interval above 0",
        lambda row: (
            f"{_gain(row)}, {row['returns']} returns; dense {row['dense_psnr']:.2f}, "
            f"window {row['window_16_psnr']:.2f}, no memory {row['empty_psnr']:.2f}, "
            f"autoencoder {row['bound_psnr']:.2f} dB"
        ),
    ),
    (
        "drift",
        "free rollouts: Frechet distance of frames 100-190 / 1-90",
        "at most 1.5",
        lambda row: (
            f"{row['ratio']:.2f} ({row['late']:.0f} / {row['early']:.0f}), {row['frames']} frames a side"
        ),
    ),
    (
        "presence",
        "things of the prompt found in the video",
        "at least 70 %",
        lambda row: (
            f"{_share(row)}; autoencoder {100 * row['autoencoder']:.1f} %, "
            f"next clip's script {100 * row['other_script']:.1f} %"
        ),
    ),
    (
        "shuffled",
        "the same with the next clip's prompt",
        "at most a third of that",
        lambda row: _share(row),
    ),
    (
        "presence",
        "the same on the script's render (the detector itself)",
        "at least 97 %",
        lambda row: f"{100 * row['real']:.1f} %",
    ),
    (
        "presence",
        "things found by motion, frames of all clips together",
        "",
        lambda row: _shares(row["by_motion"]),
    ),
    (
        "presence",
        "the same by things in the shot and by size",
        "",
        lambda row: f"{_shares(row['by_actors'])}; {_shares(row['by_size'])}",
    ),
    (
        "presence",
        "distance to the script's render, PSNR",
        "",
        lambda row: f"{row['psnr']:.2f} dB",
    ),
)
"""Measure as `evaluate.py` names it, what the line is called, its target, how a result is written."""


def evaluation_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Text columns measure, target, measured; measures that were not run are left out."""
    found = {row["measure"]: row for row in rows}
    lines = [(title, target, write(found[name])) for name, title, target, write in LINES if name in found]
    return pd.DataFrame(lines, columns=["measure", "target", "measured"])


def evaluation_page(rows: Sequence[Row]) -> str:
    """The table as Markdown, and below it what its numbers were made with (`made` of a row), each maker once."""
    makers = dict.fromkeys(str(row["made"]) for row in rows if "made" in row)
    return to_markdown(evaluation_table(rows)) + "".join(f"\nMeasured with {maker}.\n" for maker in makers)


def made_with(checkpoint: str | None, timesteps: Sequence[float], device: torch.device) -> str:
    """Weights, sampler, machine, code and day, in one line."""
    made = environment(device=device)
    steps = ", ".join(f"{step:g}" for step in timesteps)
    return (
        f"checkpoint {str(checkpoint)[:8]}, timesteps {steps}, {made['device']}, "
        f"torch {made['packages'].get('torch')}, code {code_of(made)}, {made['time'][:10]}"
    )


def _gain(row: Row) -> str:
    return f"{row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}] dB"


def _share(row: Row) -> str:
    low, high = (100 * row[name] for name in ("low", "high"))
    return f"{100 * row['share']:.1f} [{low:.1f}, {high:.1f}] %, {row['clips']} clips"


def _shares(shares: Mapping[str, float]) -> str:
    """The worst first."""
    return ", ".join(
        f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(), key=lambda x: x[1])
    )
