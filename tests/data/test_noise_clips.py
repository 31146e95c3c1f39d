"""Clips of noise: a function of their seed, of the sizes that a backbone wants."""

import pytest
import torch

from fastar.data.noise import NoiseClips

SIZES = {"channels": 4, "frame_size": (16, 24)}


def test_a_clip_is_a_function_of_its_index_and_the_seed() -> None:
    def make(seed: int = 0) -> NoiseClips:
        return NoiseClips(**SIZES, text_dim=8, text_len=12, prompt_tokens=(2, 9), num_actions=5, seed=seed)

    first, again = make().clip(3, history=6, future=2), make().clip(3, history=6, future=2)
    assert first.keys() == {"latents", "prompt", "prompt_tokens", "actions"}
    assert all(torch.equal(first[key], again[key]) for key in first)  # type: ignore[literal-required]
    for other in (make().clip(4, history=6, future=2), make(1).clip(3, history=6, future=2)):
        assert not torch.equal(other["latents"], first["latents"])
        assert not torch.equal(other["prompt"], first["prompt"])
    assert first["latents"].shape == (6, 4, 2, 3) and first["actions"].shape == (8,)
    tokens = int(first["prompt_tokens"])
    assert first["prompt"].shape == (12, 8) and first["prompt"][:tokens].abs().sum(-1).min() > 0
    assert 2 <= tokens <= 9 and not first["prompt"][tokens:].any()
    lengths = {int(make().clip(index, history=1, future=1)["prompt_tokens"]) for index in range(200)}
    assert lengths == set(range(2, 10))


def test_latents_are_standard_normal_and_the_rest_only_comes_where_it_is_wanted() -> None:
    clip = NoiseClips(channels=16, frame_size=(64, 64)).clip(0, history=40, future=0)
    assert clip.keys() == {"latents"} and clip["latents"].dtype == torch.float32
    assert abs(clip["latents"].mean()) < 0.02 and abs(clip["latents"].std() - 1) < 0.02


def test_prompts_longer_than_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"within 1\.\.8, the text length, got \[2, 9\]"):
        NoiseClips(**SIZES, text_dim=4, text_len=8, prompt_tokens=(2, 9))
