"""VBench over videos that are there already, and the stand-ins beside it; what experiments/vbench.py runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.compare.command import check_writable, wide_console
from fastar.compare.folders import Collection, collect
from fastar.data.video import read_mp4
from fastar.metrics.quality import LITE, VideoScore, check_measures, quality_rows
from fastar.metrics.quality.vbench import VBench, dimensions_for
from fastar.metrics.quality.vbench_score import DIMENSIONS, final_scores
from fastar.results import Run, RunStore, load
from fastar.results.tables import pivot, spread, to_rich

FINAL = ("total", "quality", "semantic")


def evaluate(config: DictConfig) -> list[Path]:
    """The finished runs, one for each collection of videos (`fastar.compare.folders.collect`).

    Raises:
        ValueError: nothing to score, or nothing to score it with.
    """
    place, prompts = Path(config.videos), None if config.prompts is None else Path(config.prompts)
    collections = collect(place, prompts)
    measures = _measures(config)
    runner = None if config.python is None else _runner(config)
    if runner is None and not measures:
        raise ValueError(
            "say python=..., the interpreter of the environment that VBench is installed in, or lite=true for the "
            "stand-ins"
        )
    check_writable(Path(config.paths.outputs) / config.name)
    asked = [_dimensions(config, collection) for collection in collections]
    every = sorted({name for names in asked for name in names})
    version = None if runner is None else runner.check(config.mode, every)
    console, runs = wide_console(), []
    for collection, dimensions in zip(collections, asked, strict=True):
        with _open(config, collection, dimensions, version) as run:
            if not run.finished:
                _score(run, collection, measures)
                if runner is not None:
                    _ask(run, runner, config.mode, collection, dimensions)
            runs.append(run.folder)
    rows = load(runs)
    labels = dict.fromkeys(name for one in collections for name in one.labels if name != "method")
    lines = ["method", *(name for name in labels if rows[name].nunique(dropna=False) > 1)]
    for title, table in tables(rows, lines, version, config.mode).items():
        console.print(to_rich(table, title=title))
    console.print(f"scores: {Path(config.paths.outputs) / config.name}", highlight=False, soft_wrap=True)
    return runs


def tables(rows: pd.DataFrame, lines: list[str], version: str | None, mode: str) -> dict[str, pd.DataFrame]:
    """VBench's scores, and those of the stand-ins, a line a collection; `lines` are columns that tell these apart."""
    titles = {
        f"VBench {version}, mode {mode}": [f"vbench/{name}" for name in (*FINAL, *DIMENSIONS)],
        "stand-ins (no VBench scores)": [*LITE, *(f"{name}/drift/end" for name in LITE)],
    }
    stats = {title: spread(rows, index=lines, metrics=names) for title, names in titles.items()}
    return {title: pivot(found) for title, found in stats.items() if not found.empty}


def _measures(config: DictConfig) -> dict[str, VideoScore]:
    if not config.lite:
        return {}
    made = {name: instantiate(node) for name, node in config.metrics.items()}
    check_measures(made)
    return {name: metric for name, metric in made.items() if isinstance(metric, VideoScore)}


def _runner(config: DictConfig) -> VBench:
    return VBench(
        config.python,
        config.repository,
        config.weights,
        download=config.download,
        options=list(config.options),
    )


def _dimensions(config: DictConfig, collection: Collection) -> list[str]:
    if config.python is None:
        return []
    asked = None if config.dimensions is None else list(config.dimensions)
    return dimensions_for(config.mode, asked, prompts=collection.prompts_known)


def _open(config: DictConfig, collection: Collection, dimensions: Sequence[str], version: str | None) -> Run:
    sinks = [instantiate(config.logger)]
    store = RunStore(config.paths.outputs, config.name, sinks=sinks, force=config.force)
    asked = {"mode": config.mode, "dimensions": list(dimensions), "options": list(config.options)}
    identity = {
        "videos": collection.identity(),
        "vbench": None if version is None else {"version": version, **asked},
        "lite": OmegaConf.to_container(config.metrics, resolve=True) if config.lite else None,
    }
    return store.open(
        identity, seed=[video.seed for video in collection.videos], labels=dict(collection.labels)
    )


def _score(run: Run, collection: Collection, measures: Mapping[str, VideoScore]) -> None:
    """The stand-ins of each video, which may have lengths of their own."""
    for clip, video in enumerate(collection.videos):
        for start, scores in quality_rows(measures, [read_mp4(video.path)] if measures else []):
            rows = {name: values[0] for name, values in scores.items()}
            run.log(rows, clip=clip, chunk=start, frame=start)


def _ask(run: Run, runner: VBench, mode: str, collection: Collection, dimensions: Sequence[str]) -> None:
    """VBench's scores of a collection, of its videos, and what they make together."""
    names = collection.link(run.folder / "vbench" / "videos", exact=mode.endswith("standard"))
    prompts = {names[video]: video.prompt for video in collection.videos if video.prompt is not None}
    known = prompts if collection.prompts_known else {}
    result = runner.evaluate(run.folder / "vbench" / "videos", run.folder / "vbench", mode, dimensions, known)
    run.log({f"vbench/{name}": score for name, score in result.scores.items()})
    run.log({f"vbench/{name}": score for name, score in final_scores(result.scores).items()})
    for clip, video in enumerate(collection.videos):
        found = {name: scores.get(names[video]) for name, scores in result.videos.items()}
        run.log(
            {f"vbench_video/{name}": score for name, score in found.items() if score is not None}, clip=clip
        )
    if result.missing:
        run.summary["warnings"].append(
            f"VBench looked in vain for {result.missing} videos of its prompts: its scores are not those of its "
            "benchmark"
        )
