"""Prompts of scenes: long, varied, and they say exactly what is shown."""

import re
from itertools import pairwise

import pytest

from fastar.data.scenes.prompt import Sentence, write_prompt
from fastar.data.scenes.reading import read_shot
from fastar.data.scenes.script import COLOURS, Script, Shot, draw_script

FUNCTION_WORDS = {
    "a", "above", "along", "and", "backdrop", "camera", "does", "else", "from", "has", "in", "is", "nothing", "on",
    "stays", "the", "there", "to", "wall", "with",
}  # fmt: skip


def said(split: str, clips: int, frames: int = 96) -> list[tuple[Script, tuple[Sentence, ...]]]:
    scripts = [draw_script(index, split=split, frames=frames) for index in range(clips)]  # type: ignore[arg-type]
    return [(script, write_prompt(script)) for script in scripts]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sentences_read_back_as_the_shots_they_were_written_for(split: str) -> None:
    told: dict[str, Shot] = {}
    for script, sentences in said(split, 60):
        for shot, sentence in zip(script.shots, sentences, strict=True):
            assert read_shot(sentence.text, shot.length) == shot
            same_words = told.setdefault(sentence.text, shot)
            assert (same_words.actors, same_words.background, same_words.camera) == (
                shot.actors,
                shot.background,
                shot.camera,
            )


@pytest.mark.parametrize("frames", [96, 192])
def test_prompts_are_long_but_fit(frames: int) -> None:
    """Words and punctuation marks; word pieces are a few more (twelve of the nouns are two or three)."""
    for _, sentences in said("train", 100, frames) + said("heldout", 100, frames):
        words = [len(re.findall(r"\w+|[^\w\s]", sentence.text)) for sentence in sentences]
        assert all(25 <= count <= 55 for count in words)
        assert 128 <= sum(words) + 2 * len(words) <= 450


def test_the_wording_varies_but_not_what_is_said() -> None:
    script = draw_script(0)
    texts = {write_prompt(Script(script.shots, wording))[0].text for wording in range(20)}
    assert len(texts) > 10
    assert {read_shot(text, script.shots[0].length) for text in texts} == {script.shots[0]}


def test_phrases_hold_what_was_said_and_content_leaves_out_function_words() -> None:
    for script, sentences in said("train", 40):
        for shot, sentence in zip(script.shots, sentences, strict=True):
            text, phrases = sentence.text, sentence.phrases
            assert [p.actor for p in phrases if p.kind == "actor"] == list(range(len(shot.actors)))
            assert sorted(p.kind for p in phrases if p.kind != "actor") == ["background", "camera"]
            assert all(p.end <= q.start for p, q in pairwise(phrases))
            spans = [span for phrase in phrases for span in phrase.content]
            content = [text[start:end] for start, end in spans]
            assert all(re.fullmatch(r"\w[\w ]*", words) for words in content)
            assert all(re.search(r"\b" + words + r"\b", text) for words in content)
            rest = list(text)
            for start, end in spans:
                rest[start:end] = " " * (end - start)
            assert set(re.findall(r"\w+", "".join(rest))) <= FUNCTION_WORDS
            for phrase in phrases:
                words = {text[start:end] for start, end in phrase.content}
                assert all(phrase.start <= start < end <= phrase.end for start, end in phrase.content)
                if phrase.actor is not None:
                    assert shot.actors[phrase.actor].noun in words
                assert (len(words & set(COLOURS)) == 2) == (phrase.kind == "background")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a large owl sings in the center; the wall has red and blue checks; the camera stays still.",
            "'a large owl sings",
        ),
        ("a large owl stays in the center; the camera stays still.", "one wall and one camera"),
        (
            "a large owl stays in the center; the wall has red and red checks; the camera stays still.",
            "two different",
        ),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_shot(text, 12)
