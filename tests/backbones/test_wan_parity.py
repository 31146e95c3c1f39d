"""The transformer equals diffusers' WanTransformer3DModel on shared random weights."""

import pytest
import torch
from torch import Tensor

from fastar.backbones.reference import FullAttend
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.keys import key_pairs, load_weights, to_diffusers_names

diffusers = pytest.importorskip("diffusers")

SIZES = {
    "tiny": WanConfig(dim=48, num_layers=2, num_heads=2, ffn_dim=80, text_dim=24),
    "head_dim_128": WanConfig(dim=256, num_layers=3, num_heads=2, ffn_dim=384, text_dim=40),
}
GRID, FRAMES = (4, 5), 3  # more columns than rows, so that a swap shows


def randomise(model: torch.nn.Module) -> None:
    """Every parameter away from its initial value, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "modulation" in name or parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> tuple[CausalWanTransformer, torch.nn.Module]:
    config = SIZES[request.param]
    ours = CausalWanTransformer(config).eval()
    randomise(ours)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=config.text_dim,
        freq_dim=256,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    theirs.load_state_dict(to_diffusers_names(ours.state_dict(), config), strict=True)
    return ours, theirs


def inputs(config: WanConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, FRAMES, 16, 2 * GRID[0], 2 * GRID[1], generator=generator)
    assert config.text_dim is not None
    return latents, torch.randn(2, 7, config.text_dim, generator=generator)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("timestep", [0.0, 625.0, 937.5, 1000.0])
@torch.no_grad()
def test_forward_equals_diffusers(
    pair: tuple[CausalWanTransformer, torch.nn.Module], timestep: float
) -> None:
    ours, theirs = pair
    latents, text = inputs(ours.config)
    attend = FullAttend(rope=ours.rope, grid=GRID)
    velocity = ours(latents, torch.full((2, FRAMES), timestep), attend=attend, text=text)
    expected = theirs(latents.transpose(1, 2), torch.full((2,), timestep), text).sample.transpose(1, 2)
    assert expected.std() > 0.1
    assert relative_error(velocity, expected) <= 1e-5


@torch.no_grad()
def test_a_timestep_per_frame_equals_diffusers_timestep_per_token(
    pair: tuple[CausalWanTransformer, torch.nn.Module],
) -> None:
    ours, theirs = pair
    latents, text = inputs(ours.config)
    timesteps = torch.tensor([[0.0, 500.0, 1000.0], [833.3, 625.0, 1.0]])
    velocity = ours(latents, timesteps, attend=FullAttend(rope=ours.rope, grid=GRID), text=text)
    per_token = timesteps.repeat_interleave(GRID[0] * GRID[1], dim=1)
    expected = theirs(latents.transpose(1, 2), per_token, text).sample.transpose(1, 2)
    assert relative_error(velocity, expected) <= 1e-5


@torch.no_grad()
def test_diffusers_weights_load_through_the_table(pair: tuple[CausalWanTransformer, torch.nn.Module]) -> None:
    ours, theirs = pair
    fresh = CausalWanTransformer(ours.config)
    load_weights(fresh, theirs.state_dict())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_the_table_names_every_parameter_diffusers_has_at_1_3b() -> None:
    config = WanConfig(dim=1536, num_layers=30, num_heads=12, ffn_dim=8960, text_dim=4096)
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
        )
    assert {name for _, name in key_pairs(config)} == {name for name, _ in theirs.named_parameters()}
