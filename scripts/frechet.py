"""Frechet distances of methods: of the videos a comparison kept, to dense's and the true ones, by frames and clips.

    python experiments/compare.py ... videos=20
    python scripts/frechet.py outputs/compare [RECORD.json]

Features are those of EfficientNet-Lite0's middle map (fastar/metrics/frechet.py): neither the Inception FID nor FVD.
The estimate is biased upwards for few frames: all distances here are of equally many, and say no more than their order.
"""

import sys
from pathlib import Path

import pandas as pd

from fastar.data.video import read_mp4
from fastar.metrics.frechet import EfficientNetLite0, FrechetDistance, VideoFrechetDistance
from fastar.results.files import write_json
from fastar.results.loading import find_runs


def videos(runs: str) -> dict[str, dict[str, list[Path]]]:
    """Videos of each method by kind, generated and truth, in the order of their seeds; free-running runs alone.

    Raises:
        ValueError: dense has none, or a method has not as many as dense.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for run, summary in find_runs(runs):
        if summary["labels"].get("protocol") == "C":
            kinds = found.setdefault(summary["labels"]["method"], {"generated": [], "truth": []})
            for kind, paths in kinds.items():
                paths += sorted((run / "videos").glob(f"{kind}_seed*.mp4"))
    for method, kinds in found.items():
        kinds["generated"].sort(key=lambda path: int(path.stem.split("seed")[1]))
        if len(kinds["generated"]) != len(found.get("dense", kinds)["generated"]) or not kinds["generated"]:
            raise ValueError(
                f"{method} has {len(kinds['generated'])} videos in {runs}: keep all seeds' (videos=...)"
            )
    if "dense" not in found:
        raise ValueError(f"no free-running dense in {runs}: add it to method=[...]")
    return found


def distances(found: dict[str, dict[str, list[Path]]]) -> pd.DataFrame:
    """A line per method: distances of its frames and clips to dense's and, where there is a truth, to the true ones."""
    features = EfficientNetLite0(middle=True)
    metrics = {"frames": FrechetDistance(features), "clips": VideoFrechetDistance(features)}
    lines: dict[str, dict[str, float]] = {method: {} for method in found}
    for against, real in (("dense", found["dense"]["generated"]), ("truth", found["dense"]["truth"])):
        for unit, metric in metrics.items() if real else ():
            metric.reset_real_features = True
            metric.reset()
            metric.reset_real_features = False
            for path in real:
                metric.update(read_mp4(path), real=True)
            for method, kinds in found.items():
                for path in kinds["generated"]:
                    metric.update(read_mp4(path), real=False)
                lines[method][f"{unit} to {against}"] = float(metric.compute())
                lines[method][unit] = int(metric.fake_features_num_samples)
                metric.reset()
    return pd.DataFrame.from_dict(lines, orient="index")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    found = distances(videos(sys.argv[1])).round(3)
    print(found.to_string())
    if len(sys.argv) == 3:
        write_json(Path(sys.argv[2]), found.to_dict(orient="index"))
