"""What runs of a report have in common: refused if it is not the same, and told in one line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastar.results.files import read_summary
from fastar.results.provenance import code_of

HIDDEN = ("_target_", "seed", "split", "encoder", "truth")
SHARED = ("source", "data", "prefill_frames", "frames", "rollout", "dtype")


def kinds(runs: Sequence[Path]) -> list[list[Path]]:
    """`runs` that `check_alike` lets stand together, in order of appearance."""
    found: dict[str, list[Path]] = {}
    for run in runs:
        if (summary := read_summary(run)) is not None:
            found.setdefault(json.dumps(kind_of(summary), sort_keys=True), []).append(run)
    return list(found.values())


def kind_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """What runs must share for their means to say something: weights, clips, lengths, sampler."""
    made = {"weights": str(summary["checkpoint_sha256"])[:8]}
    made |= {key: summary["config"].get(key) for key in SHARED}
    return {key: json.dumps(value, sort_keys=True) for key, value in made.items()}


def check_alike(runs: Sequence[Path]) -> None:
    """Raise a ValueError if `runs` had other clips, lengths, samplers or weights: one mean over both says nothing."""
    found: dict[str, set[str]] = {}
    for summary in (summary for run in runs if (summary := read_summary(run)) is not None):
        for key, value in kind_of(summary).items():
            found.setdefault(key, set()).add(value)
    for key, values in found.items():
        if len(values) > 1:
            raise ValueError(
                f"these runs differ in {key} ({' and '.join(sorted(values))}): report on each kind by itself, from a "
                "folder of its own (name=...)"
            )


def describe(runs: Sequence[Path]) -> str:
    """One line on backbone, weights, lengths and hardware of runs that share them, and the commits that made them."""
    summaries = [summary for run in runs if (summary := read_summary(run)) is not None]
    first, config = summaries[-1], summaries[-1]["config"]
    made = first["environment"]
    seeds = {seed for s in summaries for seed in (s["seed"] if isinstance(s["seed"], list) else [s["seed"]])}
    code = ", ".join(sorted({code_of(s["environment"]) for s in summaries}))
    data = {key: value for key, value in config["data"].items() if key not in HIDDEN}
    clips = ", ".join([config["source"], *(f"{key} {value}" for key, value in data.items())])
    return (
        f"backbone {first['labels']['backbone']}, checkpoint {str(first['checkpoint_sha256'])[:8]}, "
        f"{config['frames']} frames generated after {config['prefill_frames']} true ones ({clips}), "
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, batch {config['batch']}, {config['dtype']}, "
        f"{made['device']}, {made['threads']} threads, torch {made['packages'].get('torch')}, code {code}"
    )


def span(seeds: Sequence[int]) -> str:
    """Seeds of a batch in few characters: 0-19 for twenty in a row."""
    in_a_row = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
