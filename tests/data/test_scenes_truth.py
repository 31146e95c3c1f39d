"""Which tokens matter when and where."""

import re

import torch

from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.render import truth
from fastar.data.scenes.script import Actor, Background, Camera, Motion, Script, Shot
from fastar.data.scenes.truth import regions, relevance

SCRIPT = Script(
    (
        Shot(
            24,
            Background("dots", ("red", "blue")),
            Camera.STILL,
            (
                Actor("teddy bear", "small", (0, 2), Motion.RIGHT),
                Actor("pineapple", "large", (2, 0), Motion.FROM_LEFT),
            ),
        ),
        Shot(12, Background("plain", ("gray", "red")), Camera.LEFT, (Actor("teddy bear", "small", (1, 1)),)),
    )
)


def tokens() -> tuple[list[tuple[int, int, int]], list[str]]:
    """Pieces of at most five characters, a special token before and after each sentence."""
    offsets, texts = [], []
    for shot, sentence in enumerate(write_prompt(SCRIPT)):
        spans = [match.span() for match in re.finditer(r"\w{1,5}|[^\w\s]", sentence.text)]
        for start, end in [(0, 0), *spans, (0, 0)]:
            offsets.append((shot, start, end))
            texts.append(sentence.text[start:end])
    return offsets, texts


def test_content_tokens_of_what_is_seen_matter() -> None:
    offsets, texts = tokens()
    relevant = relevance(SCRIPT, offsets)
    visible = truth(SCRIPT).visible
    assert relevant.shape == (36, len(offsets)) and relevant.dtype == torch.bool

    def frames_of(shot: int, text: str) -> torch.Tensor:
        (token,) = [i for i, t in enumerate(texts) if t == text and offsets[i][0] == shot]
        return relevant[:, token]

    shot = truth(SCRIPT).shot
    gone = visible[:24, 0] < 0.1
    assert gone.any() and not gone.all()
    assert torch.equal(frames_of(0, "teddy")[:24], ~gone) and not frames_of(0, "bear")[24:].any()
    not_yet = visible[:24, 1] < 0.1
    assert not_yet[0] and not not_yet[-1]
    for piece in ("pinea", "pple"):
        assert torch.equal(frames_of(0, piece)[:24], ~not_yet)
    assert torch.equal(frames_of(0, "dots"), shot == 0) and torch.equal(frames_of(1, "gray"), shot == 1)
    assert torch.equal(frames_of(1, "bear"), shot == 1)
    silent = [i for i, text in enumerate(texts) if text in {"", "the", "a", ";", ",", ".", "nothi", "camer"}]
    assert len(silent) > 10 and not relevant[:, silent].any()


def test_regions_are_boxes_in_the_frame_or_all_of_it() -> None:
    offsets, texts = tokens()
    relevant, boxes = relevance(SCRIPT, offsets), regions(SCRIPT, offsets)
    assert boxes.shape == (36, len(offsets), 4)
    assert not boxes[~relevant].any()
    assert (boxes[relevant][:, 2:] > boxes[relevant][:, :2]).all()
    assert boxes[0, texts.index("dots")].tolist() == [0, 0, 128, 96]
    owner = texts.index("teddy")
    assert torch.equal(boxes[0, owner], truth(SCRIPT).boxes[0, 0])
    entering = texts.index("pinea")
    assert boxes[23, entering, 0] == truth(SCRIPT).boxes[23, 1, 0].clamp(min=0)
