"""Markdown tables of the speed that is recorded in analysis/results/speed, which documents include.

    python scripts/speed_tables.py && python scripts/include.py analysis/README.md

Fidelity beside the speed of a budget is that of fidelity_BACKBONE.json, made by scripts/fidelity_record.py, at the same
share of dense's bytes: a budget of b latent frames is b / 84 there. own_BACKBONE.md holds the speed of a trained
backbone at its own geometry (own_BACKBONE.json, mode=rollout) beside its fidelity; search.md what searches find
(search_BACKBONE.json, mode=search); loops.md and loops_memory.md are of all records loops*.json (mode=loops).
"""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastar.results.figures import ANALYSIS, RESULTS

ROOT, SPEED = ANALYSIS.parent, RESULTS / "speed"
BACKBONES = {
    "doom": "B",
    "scenes": "A",
}  # and the protocol that their scores are of; recall and output error are of A
FA4_BLOCK = 128  # queries of a block, of the AnnSA that the benchmark runs
HISTORY = 84  # latent frames that a budget is a share of
FEW = 5  # methods on a loop: fewer make no column
# Denoising steps of the loops in conf/rollout, for records of loops that do not say theirs.
STEPS = {
    "self_forcing": 4, "causvid": 3, "longlive": 4, "longlive_infinity": 4, "rolling_forcing": 5,
    "diffusion_forcing": 30, "matrix_game_2": 3,
}  # fmt: skip
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """Rows of a record."""
    return list(json.loads((SPEED / f"{name}.json").read_text())["rows"])


def write(name: str, lines: Iterable[dict[str, str]], note: str) -> None:
    """Write one table; `note` stands below it."""
    lines = list(lines)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    table = ["| " + " | ".join(columns) + " |", "| :-- " + "| --: " * (len(columns) - 1) + "|"]
    table += ["| " + " | ".join(line.get(column, "–") for column in columns) + " |" for line in lines]
    (SPEED / f"{name}.md").write_text("\n".join(table) + f"\n\n{note}\n")


def by_method(rows: list[Row], cost: str) -> list[Row]:
    """Rows of one method together, methods in the order in which they come, the smallest cost first."""
    order = list(dict.fromkeys(row.get("method") for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.get("method")), row.get(cost) or 0))


def made_on(*names: str) -> str:
    """Machine, torch and days of records that were made alike."""
    cards = [json.loads((SPEED / f"{name}.json").read_text())["card"] for name in names]
    days = " and ".join(sorted({card.get("day", "2026-11-26") for card in cards}))
    return f"{cards[0]['device']}, torch {cards[0]['torch']}, {days}, {cards[0].get('dtype', 'bfloat16')}"


def engines() -> None:
    """Engines by call and number of keys."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows_of("engines"):
        if row["reason"] is not None:
            continue
        call = row["kind"] + (f", density {row['density']:.2f}" if row["density"] < 0.99 else "")
        line = lines.setdefault((row["engine"], call), {"engine": row["engine"], "call": call})
        own = f" ({row['of_dense']:.2f})" if row["of_dense"] and row["kind"] != "dense" else ""
        line[f"{row['keys']:,} keys: ms"] = f"{row['ms']:.2f}"
        line[f"{row['keys']:,} keys: TFLOP/s"] = f"{row['tflops']:.0f}{own}"
    order = ["fa4", "flashinfer", "cudnn", "sdpa", "packed int8", "packed int4"]
    ordered = sorted(lines.values(), key=lambda line: order.index(line["engine"]))
    launched = sorted({row["engine"] for row in rows_of("engines") if row["captured"] is False})
    note = (
        "4,680 queries, 12 heads of 128; in brackets the share of the same engine's dense rate. Timed as CUDA graphs"
        f"{' but for ' + ', '.join(launched) if launched else ''}. "
    )
    write("engines", ordered, note + made_on("engines") + ".")


def budgets() -> None:
    """Whole rollouts by method and budget, with what the budget costs where that is measured."""
    costs, clips = fidelity()
    lines = []
    for row in by_method(rows_of("rollout"), "budget"):
        if "fps_commit" not in row or "budget" not in row or row.get("reason"):
            continue
        line = {
            "method": row["method"],
            "budget": "–" if row.get("budget") is None else f"{row['budget']:g}",
            "frames/s, denoise": f"{row['fps_denoise']:.1f}",
            "+ commit": f"{row['fps_commit']:.1f}",
            "over stock": f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            "over dense": f"{row['over_dense']:.1f}" if "over_dense" in row else "–",
            "chunk p50 / p99 (ms)": f"{1e3 * row['latency_p50']:.0f} / {1e3 * row['latency_p99']:.0f}",
            "pass over its floor": f"{row['over_floor']:.2f}",
            "peak (GiB)": f"{row['peak_allocated'] / 2**30:.1f}",
        }
        lines.append(line | costs.get((row["method"], line["budget"]), {}))
    note = (
        "Video frames a second in the steady state, denoising and commits, no decoding; Wan2.1-1.3B at 480x832, random "
        "weights, cache contents from recorded motion; fused, captured. Recall and output error: trained backbones, "
        f"protocol A, {clips}, the same share of dense's bytes, AnnSA in blocks of 16 x 32. p99 of 8 chunks (stock: "
        "100) is near their slowest. "
    )
    write("budgets", lines, note + made_on("rollout") + ".")


def fidelity() -> tuple[dict[tuple[str, str], dict[str, str]], str]:
    """Attention recall and output error by method and budget, in blocks in proportion to the chunks; of which clips."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    told = []
    for backbone in BACKBONES:
        record = json.loads((SPEED / f"fidelity_{backbone}.json").read_text())
        for row in record["rows"]:
            scored = row["protocol"] == "A" and "recall" in row and "budget_share" in row
            if scored and row.get("block") != FA4_BLOCK:
                budget = float(f"{row['budget_share'] * HISTORY:.2g}")
                found.setdefault((row["method"], f"{budget:g}"), {}).update(
                    {
                        f"recall, {backbone}": f"{row['recall'][0]:.3f}",
                        f"output error, {backbone}": f"{row['output_error'][0]:.3f}",
                    }
                )
        told.append(f"{record['card']['clips']} clips of {backbone}")
    return found, " and ".join(told)


def own() -> None:
    """The trained backbones at their own geometry: what a budget's speed costs."""
    for backbone, protocol in BACKBONES.items():
        name = f"own_{backbone}"
        card = json.loads((SPEED / f"{name}.json").read_text())["card"]
        record = json.loads((SPEED / f"fidelity_{backbone}.json").read_text())
        rows = [row for row in rows_of(name) if "fps_commit" in row and not row.get("reason")]
        lines = []
        for row in by_method(rows, "budget_share"):
            method, share = row["method"], row.get("budget_share")
            all_of_it = {
                "stock": (f"dense, captured: its last {card['history_frames']} frames", "1"),
                "dense": ("dense, unbounded, not captured", "–"),
            }
            name_there, held = all_of_it.get(method) or (method, f"{share:g}")
            line = {
                "method": name_there,
                "bytes": held,
                "frames/s": f"{row['fps_commit']:.0f}",
                "over dense": f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            }
            lines.append(line | _scores(record["rows"], method, share, protocol))
        told = record["card"]
        note = (
            "Frames a second of one video in the steady state, denoising and commits, no decoding; trained weights, "
            "held-out clips, fused; over the captured dense beside it. Recall and output error in protocol A, PSNR to "
            f"dense's video (100: equal) and what follows in {protocol}, 95 % intervals over {told['clips']} clips, "
            f"{told['dtype']}, {told['device']}, {told['day']}. Speed: "
        )
        write(name, lines, note + made_on(name) + ".")


def _scores(rows: list[Row], method: str, share: float | None, protocol: str) -> dict[str, str]:
    """Fidelity of a method at a budget; with AnnSA that of the blocks that its speed was measured with."""
    mine = [row for row in rows if row["method"] == method and row.get("budget_share") == share]
    mine = [row for row in mine if row.get("block", FA4_BLOCK) == FA4_BLOCK and "reason" not in row]
    found: dict[str, str] = {}
    names = {
        "recall": ("A", "recall", 3), "output_error": ("A", "output error", 3), "psnr": (protocol, "PSNR (dB)", 1),
        "revisit_psnr": (protocol, "revisit PSNR (dB)", 1), "presence": (protocol, "presence", 3),
    }  # fmt: skip
    for name, (wanted, column, digits) in names.items():
        for row in mine:
            if row["protocol"] == wanted and name in row:
                mean, low, high = row[name]
                found[column] = f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return found


def search() -> None:
    """What cheaper searches for partners find."""
    lines, notes = [], []
    for backbone in ("wan_1_3b", "doom"):
        if not (SPEED / f"search_{backbone}.json").exists():
            continue
        card = json.loads((SPEED / f"search_{backbone}.json").read_text())["card"]
        for row in rows_of(f"search_{backbone}"):
            lines.append(
                {
                    "keys": f"{backbone}, {row['budget']:.3g} frames",
                    "search": row["search"],
                    "found the best": f"{row['best']:.3f}",
                    "of the nearer half": f"{row['best_near']:.3f}",
                    "distance in excess": f"{row['excess']:.1%}",
                    "of the nearer half's": f"{row['excess_near']:.1%}",
                }
            )
        notes.append(
            f"{backbone}: {card['layers']} layers, {card['weights']} weights, {card['contents']}, {card['frames']} "
            f"latent frames committed, {card['share']:.0%} of the slots, {made_on(f'search_{backbone}')}"
        )
    note = (
        "Slots that look for a partner among those that entered, held against the exact search by all features (2 x "
        "the head's width). Distance: expected squared logit change and value change, of the pair found over that of "
        "the best. "
    )
    if lines:
        write("search", lines, note + "; ".join(notes) + ".")


def packed() -> None:
    """Rollouts whose slots attention reads as they are stored, and unpacked into a copy."""
    lines = [
        {
            "method": row["method"],
            "budget": f"{row['budget']:g}",
            "slots": f"{row['cache_slots']:,}",
            "read": row["read"],
            "pass (ms)": f"{row['pass_ms']:.0f}",
            "frames/s": f"{row['fps_commit']:.1f}",
            "over stock": f"{row['ratio']:.2f}",
            "cache + copy (GiB)": f"{row['cache_bytes'] / 2**30:.2f} + {row['working_bytes'] / 2**30:.2f}",
            "peak (GiB)": f"{row['peak_allocated'] / 2**30:.1f}",
        }
        for row in rows_of("rollout_packed")
        if row["method"] != "stock"
    ]
    write(
        "packed",
        lines,
        "`read_slots=packed` and `unpacked`, attention whole; everything else as above. "
        + made_on("rollout_packed")
        + ".",
    )


def fp8() -> None:
    """The same with 8-bit linears."""
    lines = [
        {
            "method": row["method"],
            "budget": "–" if row.get("budget") is None else f"{row['budget']:g}",
            "frames/s": f"{row['fps_commit']:.1f}",
            "over stock": f"{row['ratio']:.2f}",
            "pass (ms)": f"{row['pass_ms']:.1f}",
        }
        for row in rows_of("rollout_fp8")
        if "fps_commit" in row and "budget" in row and not row.get("reason")
    ]
    write(
        "fp8",
        lines,
        "Linears in e4m3, attention whole; everything else as above. " + made_on("rollout_fp8") + ".",
    )


def commits() -> None:
    """Steps of a TempCache commit, all layers."""
    lines = []
    for text in (SPEED / "commit.jsonl").read_text().splitlines():
        row = json.loads(text)
        steps = ("moment", "features", "match", "merge", "renew", "edit", "graph")
        lines.append(
            {"setting": row["setting"], "budget": f"{row['budget_frames']:g}"}
            | {("all, captured" if step == "graph" else step): f"{row[step]:.1f}" for step in steps}
        )
    note = "ms for 30 layers; contents are stand-ins (slowly changing tokens), for timing alone. "
    write("commit", lines, note + made_on("rollout_packed") + ".")  # the same day and machine


def loops() -> None:
    """Every loop with every method: frames a second, and peak memory in a table of its own."""
    names = sorted(path.stem for path in SPEED.glob("loops*.json"))
    rows = [row for name in names for row in rows_of(name)]
    methods = Counter(_loop(row) for row in rows)
    speed: dict[str, dict[str, str]] = {}
    memory: dict[str, dict[str, str]] = {}
    told, failed = [], []
    for row in rows:
        method, loop = row["method"], _loop(row)
        if row["reason"]:
            failed.append(f"{method} on {loop}: {row['reason']}")
            continue
        fps, peak = f"{row['fps']:.1f} ({row['fps_median']:.1f})", f"{row['peak_allocated'] / 2**30:.1f}"
        if methods[loop] < FEW:
            told.append(f"{method} on {loop} {fps} and {peak} GiB")
            continue
        speed.setdefault(method, {"method": method})[loop] = fps
        memory.setdefault(method, {"method": method})[loop] = peak
    missing = {path.stem for path in (ROOT / "conf/method").glob("*.yaml")} - {row["method"] for row in rows}
    write(
        "loops",
        speed.values(),
        "Video frames a second of the chunks after the first, in brackets of the median chunk: what is compiled after "
        "the first counts in the former. wan_1_3b where no backbone is named; 21 latent frames (skyreels_v2_df_1_3b: "
        f"25, wan_14b: 3), random weights and noise, not captured. A dash: not run; on no loop: "
        f"{', '.join(sorted(missing))}. Besides: {'; '.join(told)}. {made_on(*names)}. Could not run: "
        f"{'; '.join(failed)}.",
    )
    write(
        "loops_memory",
        memory.values(),
        "Most that was allocated, weights counted, GiB; of the runs in loops.md.",
    )


def _loop(row: Row) -> str:
    """A loop, its steps, and whose it is."""
    steps = row.get("steps", STEPS[row["loop"]])
    of = "" if row["backbone"] in ("wan_1_3b", row["loop"]) else f" of {row['backbone']}"
    return f"{row['loop']}{of}, {steps} steps"


def parts() -> None:
    """Where a chunk's time goes, by profile."""
    rows = [row for row in rows_of("modules") if row.get("how") == "profile" and row.get("ms") is not None]
    lines: dict[tuple[str, float | None], dict[str, str]] = {}
    for row in rows:
        budget = row["budget"]
        line = lines.setdefault(
            (row["method"], budget),
            {"method": row["method"], "budget": "–" if budget is None else f"{budget:g}"},
        )
        line[row["part"]] = f"{row['ms']:.1f}"
    write("parts", lines.values(), "ms of a captured chunk by kind of kernel. " + made_on("modules") + ".")


TABLES = (engines, budgets, own, search, packed, fp8, commits, loops, parts)

if __name__ == "__main__":
    for make in TABLES:
        make()
