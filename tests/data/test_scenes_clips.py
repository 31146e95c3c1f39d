"""Clips of scenes: a number fixes every bit, no shard repeats another, prompts as the backbone reads them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader, default_collate

from fastar.compare.clips import Clips, load_clips
from fastar.data.scenes.dataset import NUM_ACTIONS, ScenesClips
from fastar.data.scenes.detector import presence
from fastar.data.scenes.embedding import CLAUSE_CODE, SHOT_CODE, codes, embed, position_code
from fastar.data.scenes.embedding import number as number_prompt
from fastar.data.scenes.nouns import NOUNS
from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.render import render
from fastar.data.scenes.script import draw_script
from fastar.data.scenes.truth import relevance
from tests.letters import Letters

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_a_number_fixes_every_bit_of_a_clip() -> None:
    chosen = list(ScenesClips(frames=24).numbered([2, 0]))
    assert [int(clip["index"]) for clip in chosen] == [2, 0]
    in_order = list(ScenesClips(frames=24, clips=3))
    assert chosen[0].keys() == {"frames", "actions", "index"}
    assert all(torch.equal(chosen[0][key], in_order[2][key]) for key in chosen[0])
    assert not torch.equal(next(ScenesClips(frames=24, seed=1).numbered([2]))["frames"], chosen[0]["frames"])
    later = list(ScenesClips(frames=24, clips=2, first_index=1))
    assert [int(clip["index"]) for clip in later] == [1, 2]


def test_items_hold_frames_and_the_timecode() -> None:
    data = ScenesClips(frames=192, split="heldout")
    clip = next(iter(data))
    assert torch.equal(clip["frames"], render(data.script(0)))
    assert clip["actions"].dtype == torch.int64 and clip["actions"].max() < NUM_ACTIONS == 192
    pairs = [(int(action) // 24, int(action) % 24) for action in clip["actions"]]
    assert pairs == data.script(0).timecode()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_share_the_clips(workers: int) -> None:
    loader = DataLoader(ScenesClips(frames=12, clips=5), batch_size=None, num_workers=workers)
    assert sorted(int(clip["index"]) for clip in loader) == [0, 1, 2, 3, 4]


def test_ranks_share_the_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [int(clip["index"]) for clip in ScenesClips(frames=12, clips=6)] == [1, 4]


def test_prompts_are_the_sentences_one_after_the_other() -> None:
    encoder = Letters()
    data = ScenesClips(frames=48, encoder=encoder)
    clip, again = data.numbered([5, 5])
    sentences = [sentence.text for sentence in write_prompt(data.script(5))]
    assert encoder.encoded == sentences, "those of the second time are kept"
    assert all(torch.equal(clip[key], again[key]) for key in clip)
    words = [word for text in sentences for word in text.split()]
    prompt, tokens = clip["prompt"], int(clip["prompt_tokens"])
    assert prompt.shape == (512, 8 + SHOT_CODE + CLAUSE_CODE) and prompt.dtype == torch.float16
    assert tokens == len(words) and prompt[:tokens, 0].tolist() == [float(ord(word[0])) for word in words]
    assert torch.equal(prompt[:tokens, 8:], codes(encoder, sentences).half()) and not prompt[tokens:].any()


def test_relevance_is_of_the_tokens_that_the_prompt_has() -> None:
    """One row a frame, one column a token of the embedded prompt; a word of a thing matters while it is seen."""
    data = ScenesClips(frames=48, encoder=Letters(), truth=True)
    clip, script = next(data.numbered([5])), data.script(5)
    found, tokens = clip["relevance"], int(clip["prompt_tokens"])
    assert found.shape == (48, 512) and found.dtype == torch.bool and not found[:, tokens:].any()
    words = [
        (shot, *span)
        for shot, sentence in enumerate(write_prompt(script))
        for span in Letters().offsets(sentence.text)
    ]
    assert tokens == len(words) and torch.equal(found[:, :tokens], relevance(script, words))
    of_shot = torch.tensor([shot for shot, _, _ in words])
    for row, (shot, _) in zip(found[:, :tokens], script.timecode(), strict=True):
        assert row.any() and set(of_shot[row].tolist()) == {shot}
    later = next(ScenesClips(frames=48, encoder=Letters(), truth=True, encode_later=True).numbered([5]))
    assert torch.equal(later["relevance"], found)
    assert "relevance" not in next(ScenesClips(frames=48, encoder=Letters()).numbered([5]))
    assert "relevance" not in next(ScenesClips(frames=48, truth=True).numbered([5]))


def test_presence_is_of_the_generated_frames_alone() -> None:
    """Two clips: the first shows what its script says, the second what the first one's does."""
    data = ScenesClips(frames=24, split="heldout")
    scripts = tuple(data.script(number) for number in (0, 1))
    true = torch.stack([render(script) for script in scripts])
    clips = Clips(true, torch.zeros(2, 24, dtype=torch.int64), 16, scripts=scripts)
    right, wrong = clips.presence(true[[0, 0], 16:]) or ()
    assert right >= 0.9 and wrong <= 0.2
    whole = presence(true[0].permute(0, 3, 1, 2), scripts[0])
    assert right == whole.share_from(16)
    assert replace(clips, scripts=None).presence(true[:, 16:]) is None


def test_codes_say_the_shot_and_the_clause() -> None:
    found = codes(Letters(), ["a pig stays, an owl goes; it is red.", "the end."])
    shots = [0] * 9 + [1] * 2
    clauses = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0]
    wanted = [
        torch.cat([position_code(shot, SHOT_CODE, 32), position_code(clause, CLAUSE_CODE, 8)])
        for shot, clause in zip(shots, clauses, strict=True)
    ]
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize(("numbers", "channels", "longest"), [(8, SHOT_CODE, 32), (5, CLAUSE_CODE, 8)])
def test_different_numbers_have_different_codes_of_equal_length(
    numbers: int, channels: int, longest: int
) -> None:
    found = torch.stack([position_code(n, channels, longest) for n in range(numbers)])
    assert torch.cdist(found, found).add(9 * torch.eye(numbers)).min() > 0.9
    assert found.norm(dim=1).allclose(torch.tensor((channels / 2) ** 0.5))


def test_prompts_encoded_later_are_the_same() -> None:
    now = ScenesClips(frames=48, encoder=Letters())
    later = ScenesClips(frames=48, encoder=Letters(), encode_later=True)
    batch = default_collate(list(later.numbered([3, 0, 4])))
    assert "prompt" not in batch
    expected = default_collate(list(now.numbered([3, 0, 4])))
    finished = later.finish(batch)
    assert finished.keys() == expected.keys()
    assert all(torch.equal(finished[key], expected[key]) for key in expected)
    assert now.finish(expected) is expected


def test_prompts_that_do_not_fit_are_refused() -> None:
    sentences, encoder = ["word " * 300] * 2, Letters()
    encoder.positions = 300
    for make in (
        lambda: embed(encoder, sentences, encoder.encode(sentences)),
        lambda: number_prompt(encoder, sentences),
    ):
        with pytest.raises(ValueError, match="600 tokens does not fit into 512"):
            make()
    with pytest.raises(ValueError, match="at most 8 sentences"):
        number_prompt(encoder, ["a"] * 9)


def test_wrong_arguments_fail_at_once() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ScenesClips(frames=50)
    with pytest.raises(ValueError, match="train or heldout"):
        ScenesClips(split="test")  # type: ignore[arg-type]


def test_the_config_makes_clips() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(
            "train", ["backbone=tiny", "data=scenes", "training=tiny", "backbone.context_frames=24"]
        )
    for part in (config.data.train, config.data.heldout):
        assert next(iter(instantiate(part)))["frames"].shape[0] == 24


def test_comparisons_give_the_backbone_the_prompts_of_its_clips() -> None:
    """The real config, with the encoder that ships: every word of the grammar is known to it."""
    pytest.importorskip(
        "transformers", reason="the text encoder needs transformers: pip install -e '.[text]'"
    )
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        config = compose("compare", overrides=["backbone=scenes", "data=scenes", "checkpoint=random"])
    clips = load_clips(config.data, "heldout", [3, 1], prefill=8, generated=16)
    items = list(instantiate(config.data.heldout, frames=24).numbered([3, 1]))
    assert isinstance(clips, Clips) and clips.prompts is not None and clips.prefill == 8
    for number, item in enumerate(items):
        tokens = int(item["prompt_tokens"])
        assert torch.equal(clips.frames[number], item["frames"]) and clips.prompts.lengths[number] == tokens
        assert torch.equal(clips.prompts.embeddings[number], item["prompt"].float())
        assert item["prompt"][:tokens, 0].abs().min() > 0 and not item["prompt"][tokens:].any()
        assert clips.relevance is not None and torch.equal(clips.relevance[number], item["relevance"])
        assert item["relevance"].any(1).all() and not item["relevance"][:, tokens:].any()
        assert clips.scripts is not None and torch.equal(render(clips.scripts[number]), item["frames"])


def test_the_encoder_that_ships_knows_every_word_of_the_grammar() -> None:
    words = set((CONF.parent / "checkpoints/minilm_scenes/words.txt").read_text().split())
    for split in ("train", "heldout"):
        for index in range(150):
            for sentence in write_prompt(draw_script(index, seed=5, split=split)):  # type: ignore[arg-type]
                assert set(re.findall(r"[a-z]+", sentence.text)) <= words
    assert {word for noun in NOUNS for word in noun.split()} <= words
