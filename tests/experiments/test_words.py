"""The picture of the words: what is logged of a prompt, and what is drawn of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastar.compare import words
from fastar.compare.clips import Clips
from fastar.data.scenes.truth import PhraseTokens
from fastar.results.files import PROMPT, Unwritable


@pytest.fixture
def clips() -> Clips:
    """Two clips of eight frames, one of which has phrases; tokens 0 and 1 matter first, token 3 later."""
    relevance = torch.zeros(2, 8, 6, dtype=torch.bool)
    relevance[0, :4, :2], relevance[0, 4:, 3] = True, True
    phrases = (
        PhraseTokens(0, "a small owl rests", (0, 1)),
        PhraseTokens(0, "the camera stays still", (2,)),
        PhraseTokens(1, "a big pig goes up", (3, 4)),
    )
    frames, actions = torch.zeros(2, 8, 96, 128, 3, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.long)
    return Clips(frames, actions, 0, relevance=relevance, phrases=(phrases, phrases))


def test_a_chunk_is_logged_phrase_by_phrase(clips: Clips, tmp_path: Path) -> None:
    read = torch.tensor([[1.0, 0.5, 0.0, 0.25, 0.25, 9.0], [0.0] * 6])
    words.keep(tmp_path, clips, 0, 4, read)
    words.keep(tmp_path, clips, 4, 4, None)
    first, second = words.read(tmp_path)
    assert [phrase["read"] for phrase in first["phrases"]] == [0.75, 0.0, 0.25]
    assert [phrase["matters"] for phrase in first["phrases"]] == [True, False, False]
    assert [phrase["read"] for phrase in second["phrases"]] == [1, 1, 1], "nothing was left out"
    assert [phrase["matters"] for phrase in second["phrases"]] == [False, False, True]
    assert (second["frame"], second["phrases"][2]["shot"], second["phrases"][2]["text"]) == (
        4, 1, "a big pig goes up",
    )  # fmt: skip


def test_of_a_chunk_done_twice_the_last_counts(clips: Clips, tmp_path: Path) -> None:
    words.keep(tmp_path, clips, 4, 4, torch.zeros(2, 6))
    words.keep(tmp_path, clips, 0, 4, torch.zeros(2, 6))
    words.keep(tmp_path, clips, 4, 4, torch.ones(2, 6))
    chunks = words.read(tmp_path)
    assert [chunk["frame"] for chunk in chunks] == [0, 4]
    assert [chunk["phrases"][0]["read"] for chunk in chunks] == [0, 1]


def test_a_folder_that_cannot_be_written_is_one_sentence(clips: Clips, tmp_path: Path) -> None:
    with pytest.raises(Unwritable, match="gone"):
        words.keep(tmp_path / "gone", clips, 0, 4, None)


def test_clips_without_a_script_log_nothing(clips: Clips, tmp_path: Path) -> None:
    words.keep(tmp_path, Clips(clips.frames, clips.actions, 0), 0, 4, None)
    assert not (tmp_path / PROMPT).exists()


@pytest.mark.parametrize("with_video", [False, True])
def test_the_picture_shows_what_was_read(clips: Clips, tmp_path: Path, with_video: bool) -> None:
    """The field of a phrase that was read is dark, that of one that was not is nearly white."""
    video = torch.full((8, 96, 128, 3), 200, dtype=torch.uint8) if with_video else None
    dark = []
    for number, tokens_read in enumerate((2, 0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        words.keep(folder, clips, 0, 8, (torch.arange(6) < tokens_read).float().expand(2, 6))
        chunks = words.read(folder)
        path = words.draw(chunks, folder / "words.png", title="some method", video=video)
        column = np.array(Image.open(path).convert("RGB"))[:, 700]  # through the middle of the fields
        dark.append(int((np.abs(column - np.array([8, 48, 107])).sum(1) < 12).sum()))
    assert dark[0] > 14 and dark[1] == 0, "pixels of the first phrase"


def test_runs_that_read_all_are_not_drawn(clips: Clips, tmp_path: Path) -> None:
    runs = []
    for name, read in (("dense", None), ("ranked", torch.zeros(2, 6))):
        run = tmp_path / name
        run.mkdir()
        (run / "summary.json").write_text(json.dumps({"run_id": name, "status": "done", "labels": {}}))
        words.keep(run, clips, 0, 8, read)
        runs.append(run)
    drawn = words.draw_all(tmp_path, runs, {"dense": "dense", "ranked": "ranked_lsh"})
    assert drawn == {"words_ranked_lsh": tmp_path / "words_ranked_lsh.png"}
    assert drawn["words_ranked_lsh"].is_file()
