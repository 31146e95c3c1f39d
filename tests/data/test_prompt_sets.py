"""Files of prompts: what is read of each kind, and where a file that is wrong is wrong."""

import hashlib
import json
from pathlib import Path

import pytest

from fastar.data.prompt_sets import PromptEntry, read_prompts, read_vbench

INFO = [
    {"prompt_en": "a person and a toothbrush", "dimension": ["multiple_objects"], "auxiliary_info": {"x": 1}},
    {"prompt_en": "a red bird ", "dimension": ["color", "object_class"]},
    {"prompt_en": "alley", "dimension": ["scene"]},
]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(
        tmp_path, "all_dimension.txt", "\ufeffa red bird\r\n\r\n  an owl, at night \u2028 there\na red bird\n"
    )
    found = read_prompts(file)
    assert [entry.prompt for entry in found.entries] == ["a red bird", "an owl, at night \u2028 there"]
    assert found.entries[1] == PromptEntry(
        "an owl, at night \u2028 there", "an owl, at night \u2028 there", "3"
    )
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() and len(found) == 2
    assert read_vbench(file) == found


def test_longer_prompts_are_read_and_the_short_ones_name_the_videos(tmp_path: Path) -> None:
    file, longer = (
        write(tmp_path, "a.txt", "bird\nowl\n"),
        write(tmp_path, "b.txt", "a red bird\n\nan owl, at night"),
    )
    found = read_prompts(file, extended=longer)
    named = [(entry.prompt, entry.text) for entry in found.entries]
    assert named == [("bird", "a red bird"), ("owl", "an owl, at night")]
    assert found.sha256 not in (read_prompts(file).sha256, read_prompts(longer).sha256)
    longer.write_text("a red bird")
    with pytest.raises(ValueError, match=r"b\.txt has 1 prompts and .*a\.txt 2: give a line for each"):
        read_prompts(file, extended=longer)


def test_vbenchs_json_and_its_dimensions(tmp_path: Path) -> None:
    file = write(tmp_path, "VBench_full_info.json", json.dumps(INFO))
    found = read_vbench(file)
    assert [entry.prompt for entry in found.entries] == ["a person and a toothbrush", "a red bird", "alley"]
    assert found.entries[1].dimensions == ("color", "object_class")
    chosen = read_vbench(file, dimensions=["scene", "color"])
    assert [entry.id for entry in chosen.entries] == ["2", "3"] and chosen.sha256 == found.sha256
    with pytest.raises(ValueError, match="no dimension 'colour': choose from color, mult"):
        read_vbench(file, dimensions=["colour"])
    with pytest.raises(ValueError, match="names no dimensions"):
        read_vbench(write(tmp_path, "color.txt", "a red bird"), dimensions=["color"])


def test_json_lines(tmp_path: Path) -> None:
    lines = ['{"prompt": "bird", "text": "a red bird", "seed": 3}', "", '{"prompt": "owl", "id": "night/1"}']
    first, second = read_prompts(write(tmp_path, "moviegen.jsonl", "\n".join(lines))).entries
    assert (first.text, first.seed, first.id) == ("a red bird", 3, "1")
    assert (second.text, second.seed, second.id) == ("owl", None, "night/1")


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("pictures/bird.PNG", "owl.mp4"):
        (tmp_path / name).touch()
    text = 'id,prompt,seed,start\nb,"a bird, red",7,pictures/bird.PNG\n,"two\nlines",,\no,an owl,0,owl.mp4\n'
    bird, lines, owl = read_prompts(write(tmp_path, "own.csv", text)).entries
    assert bird == PromptEntry("a bird, red", "a bird, red", "b", 7, tmp_path / "pictures/bird.PNG")
    assert (lines.prompt, lines.id, lines.seed, lines.start) == ("two\nlines", "4", None, None)
    assert (owl.seed, owl.start) == (0, tmp_path / "owl.mp4")


def test_a_part_of_a_set(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path, "a.txt", "one\ntwo\nthree"))
    assert [entry.prompt for entry in found.part(1, 1).entries] == ["two"]
    assert found.part() == found and found.part(2).entries[0].id == "3"
    for first in (3, -1):
        with pytest.raises(ValueError, match=rf"has 3 prompts: there are none from number {first} on"):
            found.part(first)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\nbird\n", "line 1 names no column prompt: start with a header, of prompt, text"),
        ("a.csv", "", "line 1 names no column prompt"),
        ("a.csv", "prompt,colour\nbird,red\n", "line 1, column 2 is 'colour': known are prompt"),
        (
            "a.csv",
            "prompt,seed\nbird, red,1\n",
            "line 2 has 3 columns and the header 2: quote what holds commas",
        ),
        (
            "a.csv",
            "prompt,seed\nbird,1\nowl,-1\n",
            "line 3, column seed must be a whole number from 0 on, got '-1'",
        ),
        ("a.csv", "prompt,seed\nbird,1\n ,2\n", "line 3, column prompt is empty"),
        (
            "a.csv",
            "prompt,start\nbird,bird.gif\n",
            r"line 2, column start must be an image or a video \(\.png",
        ),
        ("a.csv", 'prompt\n"bird\n', "line 2 is no CSV: unexpected end of data"),
        ("a.csv", "prompt,id\nbird,1\nowl,1\n", "has the id '1' twice"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "bird"}\n{"prompt": \n', "line 2, column 12 is no JSON: Expecting value"),
        ("a.jsonl", '["bird"]', "line 1 is a list: write an object with the key prompt"),
        ("a.jsonl", '{"prompt": ["bird"]}', r"line 1, column prompt must be a text, got \['bird'\]"),
        ("a.jsonl", '{"prompt": "bird", "seed": true}', "line 1, column seed must be a text, got True"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.md", "bird", r"a\.md is no file of prompts: \.txt, \.jsonl, \.csv are read"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(write(tmp_path, name, text))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt_en": "bird"}]', "entry 1 needs prompt_en, a text, and dimension, a list"),
        ('{"prompt_en": "bird"}', "is no list of prompts: VBench_full_info.json is one"),
        ('[\n{"prompt_en": bird}]', "line 2, column 15 is no JSON"),
    ],
)
def test_vbenchs_json_in_another_shape(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_vbench(write(tmp_path, "info.json", text))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no prompt file .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"line 2, column start: there is no file .*bird\.png"):
        read_prompts(write(tmp_path, "a.csv", "prompt,start\nbird,bird.png\n"))
    (tmp_path / "latin.txt").write_bytes(b"bird\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 2 is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
