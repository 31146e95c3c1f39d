"""What a comparison found, from the store: tables with spread, plots, videos side by side. Nothing is computed anew."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fastar.compare import report_plots, words
from fastar.compare.caption import check_alike, describe, span
from fastar.compare.report_plots import DENSE, TO_DENSE, protocols, varies
from fastar.compare.variants import settings_of, variant_names
from fastar.data.video import contact_sheet, read_mp4, side_by_side, write_mp4
from fastar.metrics.names import is_held
from fastar.metrics.quality import LITE
from fastar.results import load
from fastar.results.files import read_summary, write_json
from fastar.results.plots import colours_of
from fastar.results.sinks import Sink
from fastar.results.tables import differences, failures, pivot, spread, to_markdown, to_rich

QUALITY = (
    "psnr", "ssim", "vmaf", "latent_error", "psnr/truth", "revisit_psnr", "presence", "output_error", "recall",
)  # fmt: skip
PROMPT = (
    "prompt_share", "prompt_recall", "prompt_precision", "prompt_mass", "prompt_share_any", "prompt_recall_any",
    "prompt_density",
)  # fmt: skip
MEMORY = ("cache_bytes/end", "byte_share/end", "slot_share/end", "density", "block_fill", "peak_allocated")
SPEED = (
    "fps_denoise/steady", "fps_commit/steady", "fps_decode/steady", "fps/steady", "latency_p50/steady",
    "speedup/dense/steady",
)  # fmt: skip
DRIFT = tuple(f"{name}/drift/end" for name in LITE)
TABLES = {
    "quality": QUALITY, "videos by themselves (no VBench scores)": LITE, "their last window minus the first": DRIFT,
    "words of the prompt": PROMPT, "memory and work": MEMORY, "speed": SPEED,
}  # fmt: skip
SUMMARY = (
    "byte_share/end", "slot_share/end", "density", "fps/steady", "psnr", "psnr/truth", "revisit_psnr", "recall",
    "prompt_share", "prompt_recall", "presence",
)  # fmt: skip
MAY_BE_ALIKE = ("byte_share/end", "slot_share/end", "density", "recall", "prompt_share", "prompt_recall")
COMPARED = ("psnr", "revisit_psnr", *LITE)


@dataclass
class Report:
    """Tables by title, pictures and videos by name, all in `folder`."""

    folder: Path
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)
    caption: str = ""

    def show(self, console: Console) -> None:
        """Print the tables and where the rest is."""
        console.print(f"\n{self.caption}", highlight=False)
        for title, table in self.tables.items():
            console.print(to_rich(table, title=title))
        console.print(f"\ntables, plots and videos: {self.folder}", highlight=False, soft_wrap=True)

    def mirror(self, sink: Sink, summary: Mapping[str, Any], place: Path | None = None) -> None:
        """Hand everything to a sink, as a run of its own, whose files go to `place`; None: beside the report."""
        sink.start(place or self.folder, summary)
        for title, table in self.tables.items():
            sink.table(title, table)
        for name, path in self.images.items():
            sink.image(name, path)
        for name, path in self.videos.items():
            sink.video(name, path)
        sink.finish("done")


def hand_over(report: Report, config: DictConfig, identifier: str) -> None:
    """Mirror a report where `config.logger` says, as the run `identifier` of its experiment."""
    plain = OmegaConf.to_container(config, resolve=True)
    summary = {
        "run_id": identifier,
        "experiment": config.name,
        "labels": {"method": "comparison"},
        "config": plain,
    }
    report.mirror(instantiate(config.logger), summary)


def write_report(
    folder: Path,
    runs: Sequence[Path],
    *,
    methods: Sequence[str],
    seed: int,
    baseline: str,
    budget_share: float,
    remember: bool = True,
) -> Report:
    """Write tables, plots and videos of `runs`.

    Args:
        folder: of the report.
        methods: in the order of lines and colours.
        seed: whose videos are shown side by side.
        baseline: method that paired differences are taken to.
        budget_share: of the runs that are shown as curves and videos, if the report knows several.
        remember: show the runs of earlier reports in this `folder`, too: those of a sweep meet in one. The folder has
            to lie beside the runs then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _remember(folder, runs) if remember else list(runs)
    check_alike(known)
    rows = per_seed(load(known))
    names = variant_names(known, methods)
    varied = settings_of(known)
    rows["variant_of"], rows["method"] = rows["method"], rows["run_id"].map(names)
    methods = list(dict.fromkeys(names.values()))
    if "budget_share" not in rows:
        rows["budget_share"] = float("nan")
    rows["rank"] = rows["method"].map({name: rank for rank, name in enumerate(methods)})
    rows = rows.sort_values(["rank", "budget_share"], kind="stable")
    several = rows["budget_share"].nunique() > 1
    rows["line"] = [
        f"{method} {share:.0%}" if several and share == share else method
        for method, share in zip(rows["method"], rows["budget_share"], strict=True)
    ]
    rows = pd.concat([rows, _at_end(rows)], ignore_index=True)
    report = Report(folder, caption=describe(known))
    _add_tables(report, rows, baseline)
    here = _at_budget(rows, budget_share)
    colours = colours_of(methods)
    report.images |= report_plots.costs(folder, rows, here, colours)
    report.images |= report_plots.work(folder, here)
    report.images |= report_plots.ablations(folder, here, varied)
    _add_videos(report, known, names, seed, budget_share)
    report.images |= words.draw_all(report.folder, known, names)
    _save_tables(report, rows)
    _save_summaries(report, rows, budget_share, baseline)
    return report


def per_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose `seed` is one number: that of the clip, where a run had several."""

    def own(seed: int | tuple[int, ...], clip: Any) -> int | str:
        if not isinstance(seed, tuple):
            return seed
        return span(seed) if pd.isna(clip) else seed[clip]  # a time, say, is of the whole batch

    seeds = [own(seed, clip) for seed, clip in zip(rows["seed"], rows["clip"], strict=True)]
    return rows.assign(seed=pd.Series(seeds, index=rows.index, dtype=object), clip=pd.NA)


def _remember(folder: Path, runs: Sequence[Path]) -> list[Path]:
    """The runs of this report: those named, and those that runs.json already names."""
    manifest = folder / "runs.json"
    earlier = json.loads(manifest.read_text())["runs"] if manifest.exists() else []
    names = list(dict.fromkeys([*earlier, *(run.name for run in runs)]))
    write_json(manifest, {"runs": names})
    return [path for name in names if (path := folder.parent / name).is_dir()]


def _at_end(rows: pd.DataFrame) -> pd.DataFrame:
    """The last chunk's value of what grows over a rollout, as metric `<name>/end`."""
    chosen = rows[rows["metric"].map(is_held)]
    last = chosen[chosen["chunk"] == chosen.groupby(["run_id", "metric"])["chunk"].transform("max")]
    return last.assign(metric=last["metric"] + "/end", chunk=pd.NA, frame=pd.NA)


def _add_tables(report: Report, rows: pd.DataFrame, baseline: str) -> None:
    for _, meaning, part in protocols(rows):
        for title, metrics in TABLES.items():
            stats = spread(part, index="line", metrics=metrics)
            if not stats.empty:
                order = {line: rank for rank, line in enumerate(part["line"].unique())}
                table = pivot(stats).sort_values("line", key=lambda lines: lines.map(order))
                table = table.rename(columns={"line": "method"})
                report.tables[f"{meaning}; {title}"] = table
        shares = sorted(part["budget_share"].dropna().unique())
        for share in shares or [math.nan]:
            table = _paired(_at_budget(part, share), baseline)
            if table is not None:
                budget = f" at {share:.0%}" if len(shares) > 1 else ""
                report.tables[f"{meaning}; paired difference to {baseline}{budget}"] = table
    for protocol, part in rows.groupby("protocol"):
        failed = failures(part, index="line").rename(columns={"line": "method"})
        if not failed.empty:
            failed["reason"] = failed["reason"].str.split(". ", regex=False).str[0]
            report.tables[f"protocol {protocol}: failed runs"] = failed.astype(str)


def _save_tables(report: Report, rows: pd.DataFrame) -> None:
    text = [f"{report.caption}\n"]
    text += [f"\n**{title}**\n\n{to_markdown(table)}" for title, table in report.tables.items()]
    (report.folder / "results.md").write_text("".join(text))
    stats = spread(rows, index=["protocol", "method", "budget_share"])
    stats.to_csv(report.folder / "results.csv", index=False)


def _save_summaries(report: Report, rows: pd.DataFrame, budget_share: float, baseline: str) -> None:
    """For a page to include: a few columns a protocol, and paired differences, at every budget.

    summary_A.md and differences_A.md are at `budget_share`, summary_A_5.md at 5 %, and so on.
    """
    for protocol, _, part in protocols(rows):
        for share in {budget_share, *part["budget_share"].dropna()}:
            here = _at_budget(part, share)
            name = protocol if share == budget_share else f"{protocol}_{100 * share:g}"
            stats, paired = spread(here, metrics=_telling(here)), _paired(here, baseline)
            if not stats.empty:
                text = f"{to_markdown(pivot(stats))}\nProtocol {protocol}; {report.caption}.\n"
                (report.folder / f"summary_{name}.md").write_text(text)
            if paired is not None:
                note = f"paired differences to {baseline}, mean over seeds and 95 % bootstrap interval."
                text = f"{to_markdown(paired)}\nProtocol {protocol}; {note}\n"
                (report.folder / f"differences_{name}.md").write_text(text)


def _telling(rows: pd.DataFrame) -> list[str]:
    """Columns of a summary, without those in which several methods are all alike.

    Work (density) has a column where memory has none: in a bounded cache it follows from the slots.
    """
    told = [name for name in SUMMARY if name not in MAY_BE_ALIKE or varies(rows, name)]
    if "density" in told and "slot_share/end" in told and rows["method"].nunique() > 1:
        told.remove("density")
    return told


def _paired(rows: pd.DataFrame, baseline: str) -> pd.DataFrame | None:
    """Table of every method's paired differences to `baseline`; None if that has no scores, or on one seed only.

    Dense's score against itself is a cap; a difference to it would say nothing and is left out.
    """
    scored = rows[rows["metric"].isin(COMPARED)]
    if baseline not in set(scored["method"]) or scored["seed"].nunique() < 2:
        return None
    found = differences(scored, baseline=baseline, metrics=COMPARED)
    capped = (found["metric"] == TO_DENSE) & ((found["method"] == DENSE) | (baseline == DENSE))
    found.loc[capped, ["mean", "low", "high"]] = math.nan
    return pivot(found)


def _at_budget(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """Rows of methods with that budget, and of those that follow none."""
    return rows[rows["budget_share"].isna() | (rows["budget_share"] == share)]


def _add_videos(
    report: Report, runs: Sequence[Path], names: Mapping[str, str], seed: int, budget_share: float
) -> None:
    found: dict[str, Any] = {}
    truth: dict[str, Any] = {}
    for run in runs:
        summary, video = read_summary(run), run / "videos" / f"generated_seed{seed}.mp4"
        if summary is None or summary["labels"].get("budget_share", budget_share) != budget_share:
            continue
        if video.exists():
            found[names[summary["run_id"]]] = read_mp4(video)
            told = video.with_name(f"truth_seed{seed}.mp4")
            truth = {"truth": read_mp4(told)} if told.exists() else {}
            first_frame = int(summary["config"]["prefill_frames"])
    if not found:
        return
    order = dict.fromkeys(names.values())
    shown = {**truth, **{name: found[name] for name in order if name in found}}
    path = write_mp4(report.folder / "side_by_side.mp4", side_by_side(shown, scale=1))
    report.videos["side_by_side"] = path
    sheet = report.folder / "frames.png"
    contact_sheet(shown, columns=8, first_frame=first_frame).save(sheet)
    report.images["frames"] = sheet
