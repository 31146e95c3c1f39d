"""What a recorder of redundancy has measured, as rows of the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastar.metrics.redundancy.correspondence import DISTANCES, SEARCHES
from fastar.metrics.redundancy.drift import DRIFTS
from fastar.metrics.redundancy.keys import KINDS, PAIRS
from fastar.metrics.redundancy.pca import principal_components
from fastar.metrics.redundancy.recorder import MATCHERS, PCA_COMPONENTS, RedundancyRecorder
from fastar.metrics.redundancy.top_entries import ENTRIES
from fastar.results.qualifiers import Label, table_rows

Axes = dict[str, Sequence[Label]]
Rows = dict[str, float]


def rows_of(recorder: RedundancyRecorder) -> Rows:
    """All tables as values by qualified name; means over heads where a table would be too long."""
    found: Rows = {}
    for part in (_keys, _drifts, _attention, _matches):
        for rows in part(recorder):
            found |= rows
    return found


def pictures_of(recorder: RedundancyRecorder) -> Iterator[tuple[int, Rows]]:
    """Principal components of queries and keys: values of each frame that was kept."""
    if not recorder.pictures:
        return
    frames, queries, keys = zip(*recorder.pictures, strict=True)
    found = {
        of: principal_components(torch.cat(x), PCA_COMPONENTS)
        for of, x in (("query", queries), ("key", keys))
    }
    components = range(PCA_COMPONENTS)
    for number, frame in enumerate(frames):
        values: Rows = {}
        for of, (along, shares) in found.items():
            picture = along.unflatten(0, (len(frames), -1))[number]
            axes: Axes = {"of": [of], "token": range(len(picture)), "component": components}
            values |= table_rows("pca", picture[None], **axes)
            values |= table_rows("pca_variance", shares[None], of=[of], component=components)
        yield frame, values


def _keys(recorder: RedundancyRecorder) -> Iterator[Rows]:
    layers, heads = range(recorder.num_layers), range(recorder.num_heads)
    for space, keys in recorder.keys.items():
        tables = keys.compute()
        pairs: Axes = {"space": [space], "kind": KINDS, "pairs": PAIRS, "layer": layers}
        nearest: Axes = pairs | {"pairs": PAIRS[:1], "head": heads}
        lags: Axes = {"space": [space], "kind": KINDS, "layer": layers, "lag": keys.edges}
        yield table_rows("key_cosine", tables["cosine"].nanmean(3)[None], **pairs)
        yield table_rows("key_cosine_head", tables["cosine"][None, :, :1], **nearest)
        yield table_rows("key_above", tables["above"].nanmean(3)[None], **pairs, threshold=keys.thresholds)
        yield table_rows("key_logit_change", tables["change"].nanmean(3)[None], **pairs)
        yield table_rows("key_value_change", tables["value_change"].nanmean(3)[None], **pairs)
        yield table_rows("key_cosine_at", tables["by_lag"].nanmean(2)[None], **lags)
        yield table_rows("key_identical", tables["identical"].nanmean(1)[None], space=[space], layer=layers)
    for name, rank in recorder.ranks.items():
        yield table_rows("effective_rank", rank.compute().mean(1)[None], of=[name], layer=layers)


def _drifts(recorder: RedundancyRecorder) -> Iterator[Rows]:
    axes: Axes = {"kind": DRIFTS, "layer": range(recorder.num_layers), "region": recorder.regions}
    for name, drift in [*recorder.queries.items(), ("chunks", recorder.values)]:
        if drift.update_called:  # a method sees single chunks
            metric = "value_drift" if drift is recorder.values else "query_drift"
            yield table_rows(metric, drift.compute()[None], between=[name], **axes)


def _attention(recorder: RedundancyRecorder) -> Iterator[Rows]:
    layers = range(recorder.num_layers)
    axes: Axes = {"entries": ENTRIES, "layer": layers, "density": recorder.top.densities}
    tables = recorder.top.compute()
    yield table_rows("top_recall", tables["recall"].mean(2), **axes)
    yield table_rows("top_recall_std", tables["recall"].std(2, correction=0), **axes)
    yield table_rows("top_error", tables["error"].mean(2), **axes)
    lags: Axes = {"of": ("attention", "keys"), "layer": layers, "lag": recorder.lags.edges}
    yield table_rows("lag_share", recorder.lags.compute(), **lags)
    if recorder.prompt.update_called:
        for name, table in recorder.prompt.compute().items():
            yield table_rows(f"prompt_{name}", table, layer=layers)


def _matches(recorder: RedundancyRecorder) -> Iterator[Rows]:
    if not recorder.matches.update_called:
        return
    accuracy = recorder.matches.compute()
    by, layers = (*MATCHERS, "same_place"), range(recorder.num_layers)
    axes: Axes = {"by": by, "search": SEARCHES, "within": DISTANCES, "layer": layers}
    yield table_rows("correspondence", accuracy.nanmean(4), **axes, group=recorder.groups)
    axes |= {"search": SEARCHES[:1], "within": DISTANCES[:1], "head": range(recorder.num_heads)}
    yield table_rows("correspondence_head", accuracy[:, :1, :1, ..., 0], **axes)
