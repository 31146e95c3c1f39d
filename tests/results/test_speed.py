"""Speed as benchmark.py records it, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastar.results.speed import read_speed

CARD = {
    "mode": "rollout", "backbone": "wan_1_3b", "layers": 30, "weights": "random", "dtype": "bfloat16",
    "device": "NVIDIA H100", "torch": "2.11.0", "code": "abc", "day": "2026-11-26",
}  # fmt: skip
STOCK = {
    "method": "stock", "budget": None, "reason": None, "cache_bytes": 2**30, "fps_denoise": 40.0, "fps_commit": 32.0,
    "ratio": 1.0, "ratio_low": 0.98, "ratio_high": 1.0, "peak_allocated": 3 * 2**30, "full": 1.0,
}  # fmt: skip


def recorded(tmp_path: Path, rows: list[dict[str, Any]], **card: Any) -> Path:
    path = tmp_path / "rollout.json"
    path.write_text(json.dumps({"card": CARD | card, "environment": {}, "rows": rows}))
    return path


def test_methods_are_lines_and_all_else_is_left_out(tmp_path: Path) -> None:
    faster = STOCK | {
        "method": "tempcache_fast",
        "budget": 6,
        "fps_commit": 64.0,
        "over_dense": 12.0,
        "full": 0.0,
    }
    faster |= {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    failed = {"method": "window", "budget": 3.1, "reason": "out of memory"}
    dense = [
        {"method": "dense, shared", "latent_frames": 60, "pass_ms": 1.0, "reason": None},
        {"method": "dense, shared", "over_video_frames": 3000, "fps": 2.5, "reason": None, "note": "shared"},
    ]
    table, made_on = read_speed(
        recorded(tmp_path, [STOCK, faster, failed, *dense, {"decoder": "wan", "fps": 9.0}])
    )
    lines = table.set_index("method")
    assert list(lines.index) == ["stock", "tempcache_fast, 6 frames", "window, 3.1 frames", "dense, shared"]
    assert list(lines["over stock"]) == ["1.00", "2.00 [1.90, 2.10]", "–", "–"]
    assert list(lines["over dense"]) == ["–", "12.00", "–", "–"]
    assert list(lines["ms a frame"]) == ["31.2", "15.6", "–", "400.0"]
    assert list(lines["note"]) == [
        "",
        "cache not full yet",
        "out of memory",
        "mean over 3,000 frames; shared",
    ]
    assert "hardware NVIDIA H100" in made_on and "backbone wan_1_3b" in made_on


def test_a_missing_or_foreign_record_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no speed is recorded in .* run `python experiments/benchmark.py"):
        read_speed(tmp_path / "rollout.json")
    with pytest.raises(ValueError, match="is no record of a rollout"):
        read_speed(recorded(tmp_path, [STOCK], mode="engines"))
