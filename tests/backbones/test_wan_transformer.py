"""What the transformer lets pass between frames, how it trains, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastar.backbones.reference import BlockCausalAttend, FullAttend
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.config import ActionModuleConfig
from fastar.backbones.wan.transformer import ProjectedTokens, sinusoid

CONFIG = WanConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, freq_dim=32, num_actions=5)
MODULE = ActionModuleConfig(layers=1, num_heads=2, key_embedding=4)
FRAMES, GRID = 6, (2, 3)


def values_only(stream: str, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to itself alone, so frames can only differ by what enters them."""
    return v


def make_model(config: WanConfig = CONFIG) -> CausalWanTransformer:
    torch.manual_seed(0)
    model = CausalWanTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the head and the actions start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, FRAMES, 16, 2 * GRID[0], 2 * GRID[1], generator=generator)
    timesteps = 1000 * torch.rand(2, FRAMES, generator=generator)
    return latents, timesteps, torch.randint(5, (2, FRAMES), generator=generator)


def frames_changed(before: Tensor, after: Tensor) -> list[int]:
    changed = ((before - after).abs().amax(dim=(0, 2, 3, 4)) > 1e-6).nonzero().flatten()
    return changed.tolist()


@torch.no_grad()
def test_timestep_action_and_latent_of_a_frame_reach_that_frame_alone() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()
    before = model(latents, timesteps, attend=values_only, actions=actions)
    other_time, other_action, other_latent = timesteps.clone(), actions.clone(), latents.clone()
    other_time[:, 2] = 10.0
    other_action[:, 3] = (actions[:, 3] + 1) % 5
    other_latent[:, 4, 7, 1, 2] += 1.0
    assert frames_changed(before, model(latents, other_time, attend=values_only, actions=actions)) == [2]
    assert frames_changed(before, model(latents, timesteps, attend=values_only, actions=other_action)) == [3]
    assert frames_changed(before, model(other_latent, timesteps, attend=values_only, actions=actions)) == [4]


@torch.no_grad()
def test_block_causal_attention_passes_information_forward_and_within_chunks_only() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    before = model(latents, timesteps, attend=attend, actions=actions)
    latents = latents.clone()
    latents[:, 3] += 1.0
    assert frames_changed(before, model(latents, timesteps, attend=attend, actions=actions)) == [2, 3, 4, 5]


@torch.no_grad()
def test_chunks_recomputed_on_their_own_history_equal_one_pass() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    whole = model(latents, timesteps, attend=attend, actions=actions)
    for end in (2, 4):
        part = model(latents[:, :end], timesteps[:, :end], attend=attend, actions=actions[:, :end])
        torch.testing.assert_close(part, whole[:, :end], rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_relative_frame_indices_matter_and_one_chunk_is_bidirectional() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()
    outputs = [
        model(latents, timesteps, attend=attend, actions=actions)
        for attend in (
            FullAttend(rope=model.rope, grid=GRID),
            FullAttend(rope=model.rope, grid=GRID, first_frame=1234),
            BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=FRAMES),
        )
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_patches_are_those_of_a_strided_convolution() -> None:
    model = make_model()
    latents, _, _ = make_inputs()
    expected = model.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model._patchify(latents, GRID), expected, rtol=0, atol=1e-5)


def test_a_fresh_model_predicts_zero_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    config = WanConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, text_dim=8, num_actions=5)
    model = CausalWanTransformer(config)
    latents, timesteps, actions = make_inputs()
    text = torch.randn(2, 3, 8)
    attend = FullAttend(rope=model.rope, grid=GRID)
    assert model(latents, timesteps, attend=attend, actions=actions, text=text).abs().max() == 0
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    model(latents, timesteps, attend=attend, actions=actions, text=text).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_compiled_autocast_training_step_matches_eager_float32() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    expected = model(latents, timesteps, attend=attend, actions=actions)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = compiled(latents, timesteps, attend=attend, actions=actions)
    assert (velocity - expected).abs().max() < 0.05 * expected.abs().max()
    velocity.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@torch.no_grad()
def test_numerics_agree_in_float32_and_keep_the_stream_where_they_say() -> None:
    latents, timesteps, actions = make_inputs()
    outputs, streams = {}, {}
    for numerics in ("wan", "diffusers", "self_forcing"):
        model = make_model(WanConfig(**(vars(CONFIG) | {"numerics": numerics})))
        outputs[numerics] = model(latents, timesteps, attend=values_only, actions=actions)
        model.bfloat16()
        model.blocks[0].register_forward_hook(
            lambda module, args, out, numerics=numerics: streams.__setitem__(numerics, out.dtype)
        )
        half = model(latents, timesteps, attend=values_only, actions=actions)
        assert half.dtype == (torch.float32 if numerics == "wan" else torch.bfloat16)
        assert (half - outputs[numerics]).abs().max() < 0.1 * outputs[numerics].abs().max()
    assert torch.equal(outputs["wan"], outputs["diffusers"])
    assert torch.equal(outputs["wan"], outputs["self_forcing"])
    assert streams == {
        "wan": torch.float32,
        "diffusers": torch.bfloat16,
        "self_forcing": torch.bfloat16,
    }


def test_levels_are_embedded_in_float64() -> None:
    """Cosines, then sines, of level * 10000^(-i / 128); diffusers' are of float32 angles, which parity cannot tell."""
    levels = torch.tensor([[0.0, 999.9, 833.3333]])
    waves = sinusoid(levels, 256)
    assert waves.dtype == torch.float64 and waves.shape == (1, 3, 256)
    for column, level in enumerate(levels[0].tolist()):
        for i in (0, 1, 64, 127):
            angle = level * 10000 ** (-i / 128)
            assert waves[0, column, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
            assert waves[0, column, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)


@torch.no_grad()
def test_a_block_goes_from_frames_to_picture_to_actions_to_feed_forward() -> None:
    """Matrix-Game's order, which no tensor tells, and diffusers has no such model to compare with."""
    model = make_model(replace(CONFIG, num_actions=None, image_dim=8, text_dim=6, action_module=MODULE))
    order: list[str] = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda *_: order.append("ffn"))

    def attend(stream: str, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        order.append(stream)
        return torch.zeros_like(q)

    latents, timesteps, _ = make_inputs()
    told = torch.zeros(2, FRAMES, MODULE.window, MODULE.mouse_dim + MODULE.keyboard_dim)
    model(
        latents, timesteps, attend=attend, actions=told, text=torch.zeros(2, 3, 6), image=torch.zeros(2, 4, 8)
    )
    assert order == ["self", "text", "image", "mouse", "keyboard", "ffn", "self", "text", "image", "ffn"]


@torch.no_grad()
def test_short_prompts_are_padded_with_zero_embeddings() -> None:
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "text_dim": 8}
    padded = make_model(WanConfig(**sizes, text_len=6))
    plain = make_model(WanConfig(**sizes))
    latents, timesteps, _ = make_inputs()
    text = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    attend = FullAttend(rope=plain.rope, grid=GRID)
    by_hand = plain(latents, timesteps, attend=attend, text=torch.cat([text, torch.zeros(2, 2, 8)], dim=1))
    assert torch.equal(padded(latents, timesteps, attend=attend, text=text), by_hand)
    assert not torch.allclose(plain(latents, timesteps, attend=attend, text=text), by_hand)
    with pytest.raises(ValueError, match="7 tokens and the backbone reads 6"):
        padded(latents, timesteps, attend=attend, text=torch.zeros(2, 7, 8))


def test_inputs_that_do_not_fit_are_refused_in_one_sentence() -> None:
    model = make_model()
    latents, timesteps, actions = make_inputs()

    def forward(latents: Tensor, timesteps: Tensor, **inputs: Tensor) -> Tensor:
        return model(latents, timesteps, attend=values_only, **inputs)

    with pytest.raises(ValueError, match=r"latents must be \[batch, frames, 16, h, w\]"):
        forward(latents[:, :, :8], timesteps, actions=actions)
    with pytest.raises(ValueError, match=r"timesteps must be one per frame, \(2, 6\)"):
        forward(latents, timesteps[:, 0], actions=actions)
    with pytest.raises(ValueError, match=r"actions must be one per frame, \(2, 6\)"):
        forward(latents, timesteps, actions=actions[:, :5])
    with pytest.raises(ValueError, match="num_actions is 5"):
        forward(latents, timesteps)
    with pytest.raises(ValueError, match="text_dim is None"):
        forward(latents, timesteps, actions=actions, text=torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="3x6 do not divide into 2x2 patches"):
        forward(latents[:, :, :, :3], timesteps, actions=actions)
    with pytest.raises(ValueError, match="10 tokens are not whole frames of 6"):
        FullAttend(rope=model.rope, grid=GRID)("self", 0, *torch.zeros(3, 1, 2, 10, 16))
    with pytest.raises(ValueError, match="chunk_frames must be at least 1"):
        BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": 3}, "not divisible by num_heads 3"), ({"numerics": "half"}, "got 'half'")],
)
def test_configs_that_cannot_be_built_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig(**(vars(CONFIG) | change))


TEXT_CONFIG = replace(CONFIG, num_actions=None, text_dim=12, text_len=9)


@torch.no_grad()
def test_a_prompt_projected_once_is_the_prompt() -> None:
    model, generator = make_model(TEXT_CONFIG), torch.Generator().manual_seed(2)
    latents, timesteps, _ = make_inputs()
    text = torch.randn(2, 7, 12, generator=generator)
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    projected = model.project_text(text)
    assert [(k.shape, v.shape) for k, v in projected] == [((2, 2, 9, 16), (2, 2, 9, 16))] * 2
    raw, once = (model(latents, timesteps, attend=attend, text=words) for words in (text, projected))
    assert torch.equal(raw, once)
    assert (model(latents, timesteps, attend=attend, text=model.project_text(-text)) - raw).abs().max() > 1e-4


def test_projected_text_of_another_model_is_refused() -> None:
    model = make_model(TEXT_CONFIG)
    latents, timesteps, actions = make_inputs()
    projected = model.project_text(torch.randn(2, 7, 12))
    with pytest.raises(ValueError, match="must be of 2 layers, got 1: use project_text"):
        model(latents, timesteps, attend=values_only, text=projected[:1])
    with pytest.raises(ValueError, match=r"text must be \[batch, tokens, 12\], got \(2, 7, 8\)"):
        model.project_text(torch.randn(2, 7, 8))
    without = make_model()
    with pytest.raises(ValueError, match="text_dim is None"):
        without.project_text(torch.randn(2, 7, 12))
    with pytest.raises(ValueError, match="text_dim is None"):
        without(latents, timesteps, attend=values_only, actions=actions, text=projected)


IMAGE_CONFIG = replace(CONFIG, num_actions=None, in_channels=22, image_dim=10, action_module=MODULE)


def test_inputs_of_image_and_action_models_that_do_not_fit_are_refused() -> None:
    model = make_model(IMAGE_CONFIG)
    latents, timesteps, _ = make_inputs()
    right = {
        "actions": torch.zeros(2, FRAMES, 12, 6),
        "image": torch.zeros(2, 5, 10),
        "condition": torch.zeros(2, FRAMES, 6, 2 * GRID[0], 2 * GRID[1]),
    }

    def forward(**changes: Tensor | ProjectedTokens | None) -> Tensor:
        return model(latents, timesteps, attend=values_only, **(right | changes))

    wrong: list[tuple[dict[str, Tensor | ProjectedTokens | None], str]] = [
        ({"actions": None}, "num_actions is None, action_module there"),
        ({"actions": torch.zeros(2, FRAMES)}, r"\(2, 6, 12, 6\), got \(2, 6\): use action_windows"),
        ({"image": None}, "Pass image exactly when the backbone reads it: image_dim is 10"),
        ({"image": torch.zeros(2, 5, 9)}, r"image must be \[batch, tokens, 10\], got \(2, 5, 9\)"),
        ({"image": ((latents, latents),)}, "projected image must be of 2 layers, got 1: use project_image"),
        ({"condition": None}, r"condition must be \(2, 6, 6, 4, 6\), .* got None"),
        ({"condition": torch.zeros(2, FRAMES, 5, 4, 6)}, r"\(2, 6, 6, 4, 6\), .* got \(2, 6, 5, 4, 6\)"),
        ({"text": torch.zeros(2, 3, 8)}, "text_dim is None"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            forward(**change)
    with pytest.raises(ValueError, match="in_channels 8 hold the out_channels 16"):
        replace(CONFIG, in_channels=8)


def test_every_parameter_of_an_image_model_learns() -> None:
    torch.manual_seed(0)
    model = CausalWanTransformer(
        replace(CONFIG, in_channels=22, image_dim=10, text_dim=8, num_actions=None, fps=24)
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    latents, timesteps, _ = make_inputs()
    given = {
        "image": torch.randn(2, 5, 10),
        "text": torch.randn(2, 3, 8),
        "condition": torch.randn(2, FRAMES, 6, 4, 6),
    }
    out = model(latents, timesteps, attend=FullAttend(rope=model.rope, grid=GRID), **given)
    out.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []
