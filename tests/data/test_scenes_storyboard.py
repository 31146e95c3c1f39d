"""Prompt files: what they mean, what of it can be drawn, and one sentence about whatever is wrong."""

from pathlib import Path

import pytest
import torch

from fastar.data.scenes.dataset import timecode
from fastar.data.scenes.detector import presence
from fastar.data.scenes.render import render
from fastar.data.scenes.script import draw_script
from fastar.data.scenes.storyboard import Line, Prompt, Storyboard, read_storyboard, storyboard_of
from tests.letters import Letters

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "experiments/prompts/example.yaml"
OWL = "a large owl rests in the center; the wall has red and blue checks; the camera stays still."
BEE = "a small bee waits in the top left; the wall has blue dots on red; the camera pans left."
A_SHOT = "shots: [{frames: 12, text: a}]"
TWO = f"shots:\n- {{frames: 16, text: '{OWL}'}}\n- {{frames: 24, text: '{OWL}'}}\n"


def board(tmp_path: Path, text: str, chunk: int = 4) -> Storyboard:
    path = tmp_path / "words.yaml"
    path.write_text(text)
    return read_storyboard(path, chunk=chunk)


def test_the_words_of_a_drawn_script_are_that_script() -> None:
    script = draw_script(3, split="heldout")
    words = storyboard_of(script)
    assert words.frames == 96 and [prompt.script() for prompt in words.prompts] == [script]
    assert torch.equal(words.render(), render(script))
    assert torch.equal(words.timecode(), timecode(script))
    frames = words.render().movedim(-1, 1)
    assert words.presence(frames).share == presence(frames, script).share > 0.9


def test_a_change_takes_the_place_of_the_running_shot_and_all_that_follow(tmp_path: Path) -> None:
    words = board(
        tmp_path, TWO + f"changes:\n- at: 28\n  rewrite: 8\n  shots:\n  - {{frames: 20, text: '{BEE}'}}\n"
        f"  - {{frames: 12, text: '{OWL}'}}\n- at: 36\n  shots: [{{frames: 12, text: '{BEE}'}}]\n"
    )  # fmt: skip
    first, second, third = words.prompts
    assert (first.at, first.rewrite, first.frames) == (0, 0, 40)
    assert (second.at, second.rewrite, [line.frames for line in second.lines]) == (28, 8, [16, 20, 12])
    assert second.lines[0] == first.lines[0] and second.lines[1] == Line(20, BEE)
    assert (third.at, third.rewrite, third.lines) == (36, 0, (*second.lines[:2], Line(12, BEE)))
    assert words.frames == 48
    wanted = [n * 24 + i for n, length in enumerate((16, 20, 12)) for i in range(length)]
    assert words.timecode().tolist() == wanted
    drawn = words.render()
    parts = [(0, 28, first), (28, 36, second), (36, 48, third)]
    for start, end, prompt in parts:
        assert torch.equal(drawn[start:end], render(prompt.script())[start:end])
    frames = drawn.movedim(-1, 1)
    assert words.presence(frames).share == 1
    stale = torch.cat([frames[:28], render(first.script())[28:40].movedim(-1, 1), frames[40:]])
    found = words.presence(stale)
    assert found.expected.any(1).all() and found.found[:28].any() and not found.found[28:36].any()
    with pytest.raises(ValueError, match="have 48 frames, the video 40"):
        words.presence(frames[:40])


def test_a_script_may_become_shorter(tmp_path: Path) -> None:
    words = board(tmp_path, TWO + f"changes: [{{at: 16, shots: [{{frames: 12, text: '{BEE}'}}]}}]")
    assert words.frames == 28 and words.render().shape[0] == 28
    assert words.presence(words.render().movedim(-1, 1)).share == 1


def test_every_sentence_is_encoded_alone(tmp_path: Path) -> None:
    encoder = Letters()
    [prompt] = board(tmp_path, TWO).prompts
    embedded, tokens = prompt.embed(encoder)
    assert encoder.encoded == [OWL, OWL] and int(tokens) == 2 * len(OWL.split())
    assert embedded.shape[0] == 512 and not embedded[int(tokens) :].any()
    assert embedded[0, 0] == ord("a")


def test_the_example_can_be_drawn_and_changes_on_the_way() -> None:
    words = read_storyboard(EXAMPLE, chunk=4)
    assert words.frames == 96 and len(words.prompts) == 2 and words.prompts[1].rewrite > 0
    assert words.presence(words.render().movedim(-1, 1)).share > 0.97


def test_sentences_that_cannot_be_drawn_are_prompts_all_the_same(tmp_path: Path) -> None:
    words = board(tmp_path, "shots: [{frames: 12, text: an owl and a bee}]")
    assert words.frames == 12
    with pytest.raises(ValueError, match="cannot read 'an owl and a bee'"):
        words.render()


@pytest.mark.parametrize(("text", "reason"), [
    ("", "shots is missing"),
    ("- a", "must hold a list named shots"),
    ("shots: 3", "shots: "),
    ("shots: []", "shots must hold 1 to 8 shots, not 0"),
    (f"shots: [{'{frames: 12, text: a},' * 9}]", "shots must hold 1 to 8 shots, not 9"),
    ("shots: [{frames: 16}]", r"shots\[0\].text is missing"),
    ("shots: [{frames: 16, words: a}]", "unknown key 'words': choose from frames, text"),
    (TWO + "change: []", "unknown key 'change': choose from shots, changes"),
    (TWO + "changes: [{frame: 4}]", "unknown key 'frame': choose from at, rewrite, shots"),
    ("shots: [{frames: many, text: a}]", "frames: Value 'many' of type 'str' could not be converted to Integer"),
    ("shots: [{frames: 14, text: a}]", r"shots\[0\].frames must be one of 12, 16, 20, 24, got 14"),
    ("shots: [{frames: 12, text: ' '}]", r"shots\[0\].text says nothing"),
    ("shots: [{", "it is no YAML: expected the node content.* in line 1"),
    (TWO + "changes: [{at: 16}]", r"changes\[0\].shots is missing"),
    (TWO + "changes: [{at: 18, shots: []}]", "at must be a multiple of 4, where a chunk begins, .* got 18"),
    (TWO + "changes: [{at: 40, shots: []}]", "after 0 and before 40, got 40"),
    (TWO + f"changes: [{{at: 20, {A_SHOT}}}, {{at: 20, shots: []}}]", r"changes\[1\].at .* after 20 and before 28"),
    (TWO + "changes: [{at: 8, rewrite: 6, shots: []}]", r"changes\[0\].rewrite must be a multiple of 4 from 0 to 8"),
    (TWO + "changes: [{at: 8, rewrite: 12, shots: []}]", "from 0 to 8, the frames made by then, got 12"),
    (TWO + f"changes: [{{at: 28, {A_SHOT}}}]", "more than the 12 frames that have been shown by frame 28"),
    (TWO + f"changes: [{{at: 16, shots: [{'{frames: 12, text: a},' * 8}]}}]", r"to 7 shots \(8 with .* over\), not 8"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"prompt file .*words.yaml: .*{reason}") as told:
        board(tmp_path, text)
    assert "\n" not in str(told.value) and "_File" not in str(told.value)


def test_more_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*none.yaml; experiments/prompts/ has"):
        read_storyboard(tmp_path / "none.yaml", chunk=4)
    with pytest.raises(ValueError, match="40 frames are not a whole number of 3-frame chunks"):
        board(tmp_path, TWO, chunk=3)
    long = Prompt(0, 0, (Line(12, "a " * 70),) * 8)
    with pytest.raises(ValueError, match="560 tokens does not fit into 512"):
        long.embed(Letters())
