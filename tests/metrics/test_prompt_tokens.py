"""Prompt tokens read, counted by hand in a made-up stream of calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastar.attention.context import PassContext, PassKind, Stream
from fastar.attention.events import AttendEvent
from fastar.attention.text import Selection
from fastar.metrics.prompt_tokens import PromptRecorder
from fastar.sparsity import PromptKeys

BATCH, HEADS, TOKENS, DIM, FRAMES, LAYERS = 2, 2, 8, 4, 6, 2
WORDS = (6, 4)
REAL = torch.stack([torch.arange(TOKENS) < words for words in WORDS])  # [B, S]
RELEVANCE = torch.zeros(BATCH, FRAMES, TOKENS, dtype=torch.bool)
RELEVANCE[0, 2, [0, 2]] = RELEVANCE[0, 3, [2, 5]] = True  # of frames 2 and 3: tokens 0, 2, 5
RELEVANCE[0, 0, 1] = RELEVANCE[0, 4, 3] = True  # of other chunks
RELEVANCE[1, 2, 7] = True  # padding of the second video, which has nothing else in this chunk
RELEVANCE[1, 4, 0] = True


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt() -> PromptKeys:
    return PromptKeys(normal(0, BATCH, HEADS, TOKENS, DIM), REAL[:, None].expand(-1, HEADS, -1))


def keep_of(step: int, layer: int) -> Tensor:
    """A choice that has read the padding, too."""
    chosen = normal(100 + 10 * step + layer, BATCH, HEADS, TOKENS) > 0
    return chosen | ~prompt().real


def queries(step: int, layer: int) -> Tensor:
    return normal(10 * step + layer, BATCH, HEADS, 5, DIM)


def event(
    step: int,
    layer: int,
    keep: Tensor | None,
    *,
    given: PromptKeys | None = None,
    kind: PassKind = PassKind.DENOISE,
    stream: Stream = "text",
    first: int = 2,
) -> AttendEvent:
    q = queries(step, layer)
    context = PassContext(kind, first, 2, (500.0,) * 2, step=step, num_steps=4)
    return AttendEvent(
        stream, layer, context, q, q, q, None, None, q, TOKENS, Selection(given or prompt(), keep)
    )


def feed(recorder: PromptRecorder, change: Callable[[Tensor], Tensor] = lambda keep: keep) -> None:
    """Two dense and two sparse steps of a chunk, and calls that do not count."""
    nothing = ~prompt().real
    for layer in range(LAYERS):
        for step in (0, 1):
            recorder.on_attend(event(step, layer, None))
        for step in (2, 3):
            recorder.on_attend(event(step, layer, change(keep_of(step, layer))))
        recorder.on_attend(event(0, layer, nothing, kind=PassKind.COMMIT))
        recorder.on_attend(event(2, layer, nothing, stream="image"))


def by_hand(video: int, relevant: set[int]) -> dict[str, float]:
    words = range(WORDS[video])
    found: dict[str, list[float]] = {name: [] for name in ("share", "mass", "recall", "precision")}
    any_share, any_recall = [], []
    for step in (2, 3):
        union: set[int] = set()
        for layer in range(LAYERS):
            q, keep = queries(step, layer), keep_of(step, layer)
            for head in range(HEADS):
                read = {t for t in words if keep[video, head, t]}
                union |= read
                logits = q[video, head] @ prompt().k[video, head].mT / DIM**0.5
                mass = logits.softmax(-1).sum(0)
                found["share"].append(len(read) / len(words))
                found["mass"].append(float(sum(mass[t] for t in read) / sum(mass[t] for t in words)))
                if relevant:
                    found["recall"].append(len(read & relevant) / len(relevant))
                if read:
                    found["precision"].append(len(read & relevant) / len(read))
        any_share.append(len(union) / len(words))
        if relevant:
            any_recall.append(len(union & relevant) / len(relevant))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    measures = {f"prompt_{name}": mean(values) for name, values in found.items()}
    return measures | {"prompt_share_any": mean(any_share), "prompt_recall_any": mean(any_recall)}


def test_measures_are_those_counted_by_hand() -> None:
    recorder = PromptRecorder(RELEVANCE)
    feed(recorder)
    found = recorder.scores()
    for video, relevant in enumerate(({0, 2, 5}, set[int]())):
        expected = by_hand(video, relevant)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][video] == pytest.approx(value, nan_ok=True), (name, video)
    assert math.isnan(found["prompt_recall"][1]) and math.isnan(found["prompt_recall_any"][1])
    assert 0 < found["prompt_share"][0] < found["prompt_share_any"][0] <= 1
    assert 0 < found["prompt_recall"][0] <= found["prompt_recall_any"][0]


def test_without_a_truth_there_is_neither_recall_nor_precision() -> None:
    recorder = PromptRecorder()
    feed(recorder)
    assert recorder.scores().keys() == {"prompt_share", "prompt_mass", "prompt_share_any"}
    assert recorder.scores() == {}, "forgotten"


def test_a_chunk_of_dense_calls_reads_everything() -> None:
    recorder = PromptRecorder(RELEVANCE)
    feed(recorder)
    recorder.scores()
    for step in range(4):
        recorder.on_attend(event(step, 0, None))
    found = recorder.scores()
    for name in ("prompt_share", "prompt_mass", "prompt_share_any"):
        assert found[name] == [1, 1]
    assert found["prompt_recall"][0] == found["prompt_recall_any"][0] == 1
    assert found["prompt_precision"] == pytest.approx([3 / 6, 0])
    assert math.isnan(found["prompt_recall_any"][1])


def test_nothing_read_has_no_precision_and_no_mass() -> None:
    recorder = PromptRecorder(RELEVANCE)
    feed(recorder, lambda keep: ~prompt().real)
    found = recorder.scores()
    assert found["prompt_share"] == found["prompt_mass"] == found["prompt_share_any"] == [0, 0]
    assert found["prompt_recall"][0] == 0 and all(math.isnan(value) for value in found["prompt_precision"])


def test_each_chunk_has_its_own_relevant_tokens() -> None:
    recorder = PromptRecorder(RELEVANCE)
    keep = ~prompt().real
    keep[:, :, 3] = True
    recall = []
    for first in (0, 2, 4):
        recorder.on_attend(event(2, 0, keep, first=first))
        recall.append(recorder.scores()["prompt_recall"])
    assert [row[0] for row in recall] == [0, 0, 1] and math.isnan(recall[0][1]) and recall[2][1] == 0


def test_merged_slots_are_the_tokens_that_they_stand_for() -> None:
    """The same choices with slots in another order and padding as one slot: the same measures."""
    plain, merged = PromptRecorder(RELEVANCE), PromptRecorder(RELEVANCE)
    order = torch.tensor([[5, 2, 0, 1, 4, 3, 6, 7], [3, 1, 0, 2, 4, 7, 6, 5]])
    places = order[:, None].expand(-1, HEADS, -1)
    whole = prompt()
    k = whole.k.clone()
    for b, words in enumerate(WORDS):
        k[b, :, words:] = k[b, :, words : words + 1]
    whole = PromptKeys(k, whole.real)
    counts = torch.zeros(BATCH, HEADS, TOKENS)
    for b, words in enumerate(WORDS):
        counts[b, :, words] = math.log(TOKENS - words)
        counts[b, :, words + 1 :] = -torch.inf
    moved = k.gather(2, places[..., None].expand_as(k))
    short = PromptKeys(moved, whole.real.gather(2, places), counts, places)
    for step in (2, 3):
        for layer in range(LAYERS):
            keep = keep_of(step, layer)
            plain.on_attend(event(step, layer, keep, given=whole))
            merged.on_attend(event(step, layer, keep.gather(2, places), given=short))
    first, second = plain.scores(), merged.scores()
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert second[name] == pytest.approx(values, nan_ok=True), name
