"""Markdown tables of the speed that is recorded in analysis/results/speed, which documents include.

    python scripts/speed_tables.py && python scripts/include.py analysis/README.md

Fidelity beside the speed of a budget is that of fidelity_BACKBONE.json, made by scripts/fidelity_record.py, at the same
share of dense's bytes: a budget of b latent frames is b / 84 there. own.md holds the speed of the trained backbones at
their own geometry (own_BACKBONE.json, mode=rollout) beside their fidelity (fidelity_BACKBONE.json); search.md what
searches find (search_BACKBONE.json, mode=search). Of these two, records that are not there yet are left out.
"""

import json
from collections.abc import Iterable
from typing import Any

from fastar.results.figures import RESULTS

SPEED = RESULTS / "speed"
BACKBONES = {
    "doom": "B",
    "scenes": "A",
}  # and the protocol that their scores are of; recall and output error are of A
FA4_BLOCK = 128  # queries of a block, of the AnnSA that the benchmark runs
HISTORY = 84  # latent frames that a budget is a share of
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


def made_on(name: str) -> str:
    """Machine, torch and day of a record."""
    card = json.loads((SPEED / f"{name}.json").read_text())["card"]
    return f"{card['device']}, torch {card['torch']}, {card.get('day', '2026-11-26')}, {card.get('dtype', 'bfloat16')}"


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
    note = "4,680 queries, 12 heads of 128; in brackets the share of the same engine's dense rate. "
    write("engines", ordered, note + made_on("engines") + ".")


def budgets() -> None:
    """Whole rollouts by method and budget, with what the budget costs where that is measured."""
    rows = rows_of("rollout") + [row for row in rows_of("rollout_more") if row.get("method") != "stock"]
    rows += [
        row for row in rows_of("rollout_sparse_commits") if row["method"] == "tempcache_annsa_sparse_commits"
    ]
    costs, clips = fidelity()
    lines = []
    for row in rows:
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
        f"protocol A, {clips}, the same share of dense's bytes. p99 of 8 chunks (stock: 100) is near their "
        "slowest. "
    )
    write("budgets", lines, note + made_on("rollout") + ".")


def fidelity() -> tuple[dict[tuple[str, str], dict[str, str]], str]:
    """Attention recall and output error by method and budget, in blocks in proportion to the chunks; of which clips."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    told = []
    for backbone in BACKBONES:
        record = json.loads((SPEED / f"fidelity_{backbone}.json").read_text())
        told.append(f"{record['card']['clips']} clips of {backbone}")
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
    return found, " and ".join(told)


def own() -> None:
    """The trained backbones at their own geometry: what a budget's speed costs."""
    lines, notes, made = [], [], ""
    for backbone, protocol in BACKBONES.items():
        if not (SPEED / f"own_{backbone}.json").exists():
            continue
        record = json.loads((SPEED / f"fidelity_{backbone}.json").read_text())
        card, base = json.loads((SPEED / f"own_{backbone}.json").read_text())["card"], None
        for row in rows_of(f"own_{backbone}"):
            if "fps_commit" not in row or row.get("reason"):
                continue
            base = base or row  # the first
            share = row.get("budget_share")
            line = {
                "backbone": backbone,
                "method": f"dense, {card['history_frames']} frames" if row is base else row["method"],
                "bytes": "1" if row is base else "–" if share is None else f"{share:g}",
                "frames/s": f"{row['fps_commit']:.0f}",
                "over dense": f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
                "captured": "yes" if row["captured"] else "no",
            }
            lines.append(
                line | _scores(record["rows"], "dense" if row is base else row["method"], share, protocol)
            )
        made = made_on(f"own_{backbone}")
        told = record["card"]
        notes.append(
            f"{backbone}: scores of protocol {protocol} (recall and output error: A), {told['clips']} clips, "
            f"{told['dtype']}, {told['device']}, {told['day']}"
        )
    note = (
        "Frames a second of one video in the steady state, denoising and commits, no decoding; trained weights, "
        "held-out clips, fused; dense as a captured window of its last history. Fidelity with 95 % intervals over "
        f"clips; PSNR to dense's video. {'; '.join(notes)}. Speed: "
    )
    if lines:
        write("own", lines, note + made + ".")


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
        "`read_slots=packed` and `unpacked`; everything else as above. " + made_on("rollout_packed") + ".",
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
    write("fp8", lines, "Linears in e4m3, everything as above. " + made_on("rollout_fp8") + ".")


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
    write("commit", lines, note + made_on("rollout") + ".")


def loops() -> None:
    """Every loop with the methods that were run on it: frames a second and peak memory."""
    names = sorted(path.stem for path in SPEED.glob("loops*.json"))
    lines = [
        {
            "backbone": row["backbone"],
            "loop": row["loop"],
            "frames": str(row["latent_frames"]),
            "steps": str(row.get("steps", STEPS[row["loop"]])),
            "method": row["method"],
            "frames/s": f"{row['fps']:.1f}" if not row.get("reason") else "–",
            "peak (GiB)": f"{row['peak_allocated'] / 2**30:.1f}" if not row.get("reason") else "–",
            "note": row.get("reason") or "",
        }
        for name in names
        for row in rows_of(name)
        if "loop" in row
    ]
    note = "Random weights and noise, `frames` latent frames, not captured. "
    write("loops", lines, note + made_on("loops") + ".")


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


if __name__ == "__main__":
    for make in (engines, budgets, own, search, packed, fp8, commits, loops, parts):
        make()
