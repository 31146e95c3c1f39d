"""The W&B report on an ablation, described in code: curves and bars of all its runs, grouped by method.

Needs the extra `wandb-report` (wandb-workspaces). Building a report needs no network and no account; `push` needs both,
and uploaded runs. `python experiments/wandb_report.py` does all of it from run folders.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastar.metrics.names import METRICS, unit_of

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

INSTALL = "W&B reports need the package wandb-workspaces: pip install -e '.[wandb-report]'"

SPEED = ("speedup/dense", "fps_chunk", "chunk_s", "cache_bytes", "peak_chunk")
QUALITY = ("psnr", "psnr/truth", "latent_error", "density", "recall", "output_error", "byte_share")
SHARED_BARS = ("psnr/mean", "psnr/truth/mean", "revisit_psnr", "density/mean")
PANELS = {
    "A": ("Dense past, the method only denoises", QUALITY, SHARED_BARS),
    "B": ("Dense trajectory through the method's own cache", QUALITY, SHARED_BARS),
    "C": (
        "Free-running",
        SPEED + QUALITY,
        ("speedup/dense/steady", "fps/steady", "latency_p50/steady", *SHARED_BARS),
    ),
}
"""By protocol: meaning, curves against `frame`, bars of values of the whole run."""

MEDIA = ("side_by_side", "frames")
REPORT_RUN = "comparison"
"""Job type of the run that holds the tables, pictures and videos of a comparison."""

COLUMNS, WIDTH, HEIGHT = 3, 8, 6  # of W&B's grid, 24 wide


def build(group: str, *, project: str, entity: str, protocols: Sequence[str]) -> "wr.Report":
    """The report on the runs of `group` (the experiment, if logger.group was left alone), a section a protocol.

    Lines and bars are means over the runs of a method, with the range of its runs.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        from wandb_workspaces import expr
    except ImportError as error:
        raise ValueError(INSTALL) from error

    runs = expr.Metric("Group") == group
    method = expr.Metric("JobType")
    blocks: list[Any] = [wr.TableOfContents()]
    for protocol in protocols:
        meaning, curves, bars = PANELS[protocol]
        chosen = wr.Runset(
            name=f"protocol {protocol}",
            filters=expr.And(runs, expr.Config("protocol") == protocol, method != REPORT_RUN),
            groupby=["jobType"],
        )
        lines = [
            wr.LinePlot(
                title=name, title_x="frame", title_y=unit_of(name) or None, x="frame", y=[name],
                groupby_aggfunc="mean", groupby_rangefunc="minmax", max_runs_to_show=100, layout=_place(number, wr),
            )
            for number, name in enumerate(curves)
        ]  # fmt: skip
        totals = [
            wr.BarPlot(
                title=name, title_x=unit_of(name) or None, metrics=[name], groupby_aggfunc="mean",
                groupby_rangefunc="minmax", max_bars_to_show=100, layout=_place(number, wr),
            )
            for number, name in enumerate(bars, start=len(lines))
        ]  # fmt: skip
        blocks += [
            wr.H2(f"Protocol {protocol}: {meaning}"),
            wr.PanelGrid(runsets=[chosen], panels=lines + totals),
        ]
    media = [
        wr.MediaBrowser(title=name, media_keys=[name], layout=_place(number, wr))
        for number, name in enumerate(MEDIA)
    ]
    whole = wr.Runset(name="comparison", filters=expr.And(runs, method == REPORT_RUN))
    blocks += [wr.H2("Samples"), wr.PanelGrid(runsets=[whole], panels=media)]
    blocks += [wr.H2("What the names mean"), wr.UnorderedList(_meanings(protocols))]
    return wr.Report(project=project, entity=entity, title=group, description=f"Runs of group {group}, by method",
                     width="fluid", blocks=blocks)  # fmt: skip


def push(report: "wr.Report", *, draft: bool = False) -> str:
    """Save the report at W&B; returns its address.

    Raises:
        ValueError: W&B cannot be reached or refuses it.
    """
    try:
        report.save(draft=draft)
        return str(report.url)
    except Exception as error:
        raise ValueError(
            f"W&B did not take the report ({type(error).__name__}: {str(error).strip()}): check `wandb login` and that "
            f"{report.entity}/{report.project} is there"
        ) from error


def report_on(
    pattern: str | Path | Sequence[str | Path], *, target: str, group: str | None = None
) -> "wr.Report":
    """`build` for run folders, as `fastar.results.load` takes them; `target` is entity/project.

    `group` is what logger.group was, if that was not left alone.

    Raises:
        ValueError: no runs, runs of several experiments, or `target` is no entity/project.
    """
    from fastar.results.loading import find_runs

    entity, slash, project = target.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ValueError(f"'{target}' is not ENTITY/PROJECT, as in my-team/fastar")
    summaries = [summary for _, summary in find_runs(pattern)]
    groups = sorted({str(summary["experiment"]) for summary in summaries})
    if len(groups) > 1:
        raise ValueError(
            f"these runs are of several experiments ({', '.join(groups)}): name the folder of one"
        )
    protocols = sorted({summary["labels"].get("protocol") for summary in summaries} & PANELS.keys())
    if not protocols:
        raise ValueError(f"the runs of {groups[0]} belong to no comparison: there is nothing to compare")
    return build(group or groups[0], project=project, entity=entity, protocols=protocols)


def _place(number: int, wr: Any) -> "wr.Layout":
    row, column = divmod(number, COLUMNS)
    return wr.Layout(x=WIDTH * column, y=HEIGHT * row, w=WIDTH, h=HEIGHT)


def _meanings(protocols: Sequence[str]) -> list[str]:
    names = {
        name.split("/")[0]: None for protocol in protocols for part in PANELS[protocol][1:] for name in part
    }
    return [f"{name}: {METRICS[name].meaning}" for name in names]
