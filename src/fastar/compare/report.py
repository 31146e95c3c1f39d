"""What a comparison found, from the store: tables with spread, plots, videos side by side. Nothing is computed anew."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fastar.compare import words
from fastar.compare.caption import check_alike, describe, span
from fastar.compare.variants import settings_of, variant_names
from fastar.data.video import contact_sheet, read_mp4, side_by_side, write_mp4
from fastar.results import load
from fastar.results.files import read_summary, write_json
from fastar.results.plots import colours_of, plot_curves, plot_frontier, plot_setting
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
TABLES = {"quality": QUALITY, "words of the prompt": PROMPT, "memory and work": MEMORY, "speed": SPEED}
SUMMARY = (
    "byte_share/end", "slot_share/end", "fps/steady", "psnr", "psnr/truth", "revisit_psnr", "recall", "prompt_share",
    "prompt_recall", "presence",
)  # fmt: skip
COMPARED = ("psnr", "revisit_psnr")
DENSE, TO_DENSE = "dense", "psnr"
AT_END = ("cache_bytes", "byte_share", "slot_share")
ABLATED = (
    "psnr", "revisit_psnr", "latent_error", "recall", "slot_share/end", "density", "fps/steady", "prompt_share",
    "prompt_recall",
)  # fmt: skip

PROTOCOLS = {
    "A": "protocol A: dense past, the method only denoises",
    "B": "protocol B: dense trajectory through the method's own cache",
    "C": "protocol C: free-running",
}


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

    def mirror(self, sink: Sink, summary: Mapping[str, Any]) -> None:
        """Hand everything to a sink, as a run of its own."""
        sink.start(self.folder, summary)
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
    _add_plots(report, rows, here, colours)
    _add_prompt_plots(report, here)
    _add_ablations(report, here, varied)
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
    chosen = rows[rows["metric"].isin(AT_END)]
    last = chosen[chosen["chunk"] == chosen.groupby(["run_id", "metric"])["chunk"].transform("max")]
    return last.assign(metric=last["metric"] + "/end", chunk=pd.NA, frame=pd.NA)


def _add_tables(report: Report, rows: pd.DataFrame, baseline: str) -> None:
    for _, meaning, part in _protocols(rows):
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


def _protocols(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Each protocol's letter, meaning and rows; not C if it only served to make the dense trajectory."""
    for protocol, meaning in PROTOCOLS.items():
        part = rows[rows["protocol"] == protocol]
        if len(part) and (part["method"].nunique() > 1 or rows["method"].nunique() == 1):
            yield protocol, meaning, part


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
    for protocol, _, part in _protocols(rows):
        for share in {budget_share, *part["budget_share"].dropna()}:
            here = _at_budget(part, share)
            name = protocol if share == budget_share else f"{protocol}_{100 * share:g}"
            stats, paired = spread(here, metrics=SUMMARY), _paired(here, baseline)
            if not stats.empty:
                text = f"{to_markdown(pivot(stats))}\nProtocol {protocol}; {report.caption}.\n"
                (report.folder / f"summary_{name}.md").write_text(text)
            if paired is not None:
                note = f"paired differences to {baseline}, mean over seeds and 95 % bootstrap interval."
                text = f"{to_markdown(paired)}\nProtocol {protocol}; {note}\n"
                (report.folder / f"differences_{name}.md").write_text(text)


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


def _add_plots(report: Report, rows: pd.DataFrame, here: pd.DataFrame, colours: Mapping[str, str]) -> None:
    free = here[here["protocol"] == "C"]
    times = free[free["metric"] == "chunk_s"]
    if times["frame"].nunique() > 1 and "C" in {letter for letter, *_ in _protocols(rows)}:
        chunk = int(times["frame"].drop_duplicates().sort_values().diff().min())
        rates = times.assign(metric="fps", value=chunk / times["value"])
        for name, table, metric in (("fps_frames", rates, "fps"), ("memory_frames", free, "cache_bytes")):
            report.images[name] = plot_curves(table, metric, report.folder / f"{name}.png", colours=colours)
    setting = "budget_share" if rows["budget_share"].nunique() > 1 else None
    for protocol, meaning, part in _protocols(rows):
        for name, metric in (("fidelity_bytes", TO_DENSE), ("revisit_bytes", "revisit_psnr")):
            scored, label = part, None
            if metric == TO_DENSE:
                scored = part[part["method"] != DENSE]
            elif DENSE in set(part["method"]) and part["method"].nunique() > 1:
                scored, label = minus_dense(part, metric), f"{metric.replace('_', ' ')} minus dense's (dB)"
            if scored.loc[scored["metric"] == metric, "value"].notna().any():
                path = report.folder / f"{name}_{protocol}.png"
                report.images[f"{name}_{protocol}"] = plot_frontier(
                    scored, "cache_bytes/end", metric, path,
                    setting=setting, colours=colours, title=meaning, label=label,
                )  # fmt: skip


def _add_prompt_plots(report: Report, rows: pd.DataFrame) -> None:
    """What is kept of quality, attention and truth against the share of the prompt that is read, if that differs."""
    for protocol, meaning, part in _protocols(rows):
        selecting = part[part["variant_of"] != DENSE]
        shares = selecting.loc[selecting["metric"] == PROMPT[0], "value"].dropna()
        if not (shares < 1).any():
            continue
        for metric in (TO_DENSE, "prompt_recall", "prompt_mass", "presence"):
            if selecting.loc[selecting["metric"] == metric, "value"].notna().any():
                name = f"words_{metric}_{protocol}"
                report.images[name] = plot_frontier(
                    selecting, PROMPT[0], metric, report.folder / f"{name}.png",
                    index="variant_of", setting="method", title=meaning,
                )  # fmt: skip


def _add_ablations(report: Report, here: pd.DataFrame, varied: Mapping[str, Mapping[str, Any]]) -> None:
    """Quality and cost against each setting in which runs of a method differ, a line for each of the other settings."""
    for setting in dict.fromkeys(name for settings in varied.values() for name in settings):
        others = {
            run: "".join(f" {name}={value}" for name, value in settings.items() if name != setting)
            for run, settings in varied.items()
        }
        varies = here["run_id"].map(lambda run, name=setting: name in varied[run])
        curve = here["variant_of"] + here["run_id"].map(others)
        rows = here.assign(curve=curve, **{setting: here[setting].where(varies)})
        for protocol, meaning, part in _protocols(rows):
            capped = (part["metric"] == TO_DENSE) & (part["variant_of"] == DENSE)
            part = part[~capped]
            for metric in ABLATED:
                if part.loc[part["metric"] == metric, "value"].notna().any():
                    name = f"{setting}_{metric.replace('/', '_')}_{protocol}"
                    path = report.folder / f"{name}.png"
                    report.images[name] = plot_setting(
                        part, setting, metric, path, index="curve", title=meaning
                    )


def minus_dense(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of the other methods, with dense's `metric` on the same seed taken off theirs.

    Seeds are different places, which differ by far more than methods do: intervals of the plain score hide that.
    """
    scores = rows[rows["metric"] == metric]
    dense = scores[scores["method"] == DENSE].groupby("seed")["value"].mean()
    others = rows[rows["method"] != DENSE]
    gap = others["value"] - others["seed"].map(dense).astype(float)
    return others.assign(value=others["value"].where(others["metric"] != metric, gap))


def _add_videos(
    report: Report, runs: Sequence[Path], names: Mapping[str, str], seed: int, budget_share: float
) -> None:
    found: dict[str, Any] = {}
    truth = None
    for run in runs:
        summary, video = read_summary(run), run / "videos" / f"generated_seed{seed}.mp4"
        if summary is None or summary["labels"].get("budget_share", budget_share) != budget_share:
            continue
        if video.exists():
            found[names[summary["run_id"]]] = read_mp4(video)
            truth = read_mp4(video.with_name(f"truth_seed{seed}.mp4"))
            first_frame = int(summary["config"]["prefill_frames"])
    if truth is None:
        return
    order = dict.fromkeys(names.values())
    shown = {"truth": truth, **{name: found[name] for name in order if name in found}}
    path = write_mp4(report.folder / "side_by_side.mp4", side_by_side(shown, scale=1))
    report.videos["side_by_side"] = path
    sheet = report.folder / "frames.png"
    contact_sheet(shown, columns=8, first_frame=first_frame).save(sheet)
    report.images["frames"] = sheet
