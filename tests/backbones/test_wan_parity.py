"""The transformer equals diffusers' WanTransformer3DModel on shared random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastar.backbones.reference import FullAttend
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.keys import load_weights, to_diffusers_names
from tests.backbones.test_wan_keys import diffusers_sizes

diffusers = pytest.importorskip("diffusers")

TINY = WanConfig(dim=48, num_layers=2, num_heads=2, ffn_dim=80, text_dim=24)
TRUE_HEAD = WanConfig(dim=256, num_layers=3, num_heads=2, ffn_dim=384, text_dim=40)
IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 20, "text_len": 512}  # diffusers takes 512 tokens
SIZES = {
    "t2v_tiny": TINY,
    "t2v_head_dim_128": TRUE_HEAD,
    "i2v_tiny": replace(TINY, **IMAGE),
    "i2v_head_dim_128": replace(TRUE_HEAD, **IMAGE),
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


def twins(config: WanConfig, **options: Any) -> tuple[CausalWanTransformer, torch.nn.Module]:
    """Our model and diffusers' on the same random weights."""
    ours = CausalWanTransformer(config).eval()
    theirs = diffusers.WanTransformer3DModel(**diffusers_sizes(config), **options).eval()
    randomise(ours)
    theirs.load_state_dict(to_diffusers_names(ours.state_dict(), config), strict=True)
    return ours, theirs


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> tuple[CausalWanTransformer, torch.nn.Module]:
    return twins(SIZES[request.param])


def inputs(config: WanConfig, frames: int = FRAMES, grid: tuple[int, int] = GRID) -> dict[str, Tensor]:
    """What our forward takes beside timesteps and `attend`."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    assert config.text_dim is not None
    place = (2 * grid[0], 2 * grid[1])
    given = {"latents": draw(frames, 16, *place), "text": draw(7, config.text_dim)}
    if config.image_dim is not None:
        given |= {"image": draw(5, config.image_dim), "condition": draw(frames, 20, *place)}
    return given


def run_ours(
    model: CausalWanTransformer, given: dict[str, Tensor], timesteps: Tensor, grid: tuple[int, int] = GRID
) -> Tensor:
    return model(timesteps=timesteps, attend=FullAttend(rope=model.rope, grid=grid), **given)


def run_theirs(model: torch.nn.Module, given: dict[str, Tensor], timestep: Tensor) -> Tensor:
    latents, text = given["latents"], given["text"]
    if "image" in given:
        latents = torch.cat([latents, given["condition"]], dim=2)
        text = functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    out: Tensor = model(latents.transpose(1, 2), timestep, text, given.get("image")).sample
    return out.transpose(1, 2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("timestep", [0.0, 625.0, 937.5, 1000.0])
@torch.no_grad()
def test_forward_equals_diffusers(
    pair: tuple[CausalWanTransformer, torch.nn.Module], timestep: float
) -> None:
    ours, theirs = pair
    given = inputs(ours.config)
    velocity = run_ours(ours, given, torch.full((2, FRAMES), timestep))
    expected = run_theirs(theirs, given, torch.full((2,), timestep))
    assert expected.std() > 0.1
    assert relative_error(velocity, expected) <= 1e-5


@torch.no_grad()
def test_a_timestep_per_frame_equals_diffusers_timestep_per_token(
    pair: tuple[CausalWanTransformer, torch.nn.Module],
) -> None:
    ours, theirs = pair
    given = inputs(ours.config)
    timesteps = torch.tensor([[0.0, 500.0, 1000.0], [833.3, 625.0, 1.0]])
    velocity = run_ours(ours, given, timesteps)
    per_token = timesteps.repeat_interleave(GRID[0] * GRID[1], dim=1)
    assert relative_error(velocity, run_theirs(theirs, given, per_token)) <= 1e-5


@torch.no_grad()
def test_what_is_too_small_to_be_normalised_equals_diffusers() -> None:
    """Tokens, queries and keys of a mean square about 1e-6: what each norm adds to it is seen nowhere else."""
    ours, theirs = twins(replace(SIZES["i2v_tiny"], num_layers=1))
    for name, parameter in ours.named_parameters():
        if name.startswith("patch_embedding") or name.split(".")[-2] in ("q", "k", "k_img"):
            parameter.mul_(1e-3)
    theirs.load_state_dict(to_diffusers_names(ours.state_dict(), ours.config))
    given, timesteps = inputs(ours.config), torch.full((2, FRAMES), 625.0)
    expected = run_theirs(theirs, given, torch.full((2,), 625.0))
    assert relative_error(run_ours(ours, given, timesteps), expected) <= 1e-5
    norms = {
        name: norm for name, norm in ours.named_modules() if hasattr(norm, "eps") and "img_emb" not in name
    }
    assert len(norms) == 9
    for name in (
        "self_attn.norm_q",
        "self_attn.norm_k",
        "cross_attn.norm_q",
        "cross_attn.norm_k_img",
        "norm1",
    ):
        norms[f"blocks.0.{name}"].eps = 1e-5
        assert relative_error(run_ours(ours, given, timesteps), expected) > 1e-5, name
        norms[f"blocks.0.{name}"].eps = 1e-6


@torch.no_grad()
def test_every_input_of_an_image_model_matters() -> None:
    ours, _ = twins(SIZES["i2v_tiny"])
    given, timesteps = inputs(ours.config), torch.full((2, FRAMES), 500.0)
    before = run_ours(ours, given, timesteps)
    for name, tensor in given.items():
        assert relative_error(run_ours(ours, given | {name: -tensor}, timesteps), before) > 1e-3, name
    projected = given | {
        "image": ours.project_image(given["image"]),
        "text": ours.project_text(given["text"]),
    }
    assert torch.equal(run_ours(ours, projected, timesteps), before)


@torch.no_grad()
def test_the_model_that_is_told_its_frame_rate_equals_diffusers() -> None:
    """SkyReels-V2-DF 1.3B, with a noise level per frame; diffusers adds frame rates to batches of one alone."""
    config = replace(TRUE_HEAD, fps=24)
    ours = CausalWanTransformer(config).eval()
    randomise(ours)
    theirs = diffusers.SkyReelsV2Transformer3DModel(**diffusers_sizes(config), inject_sample_info=True).eval()
    theirs.load_state_dict(to_diffusers_names(ours.state_dict(), config), strict=True)
    given = {name: tensor[:1] for name, tensor in inputs(config).items()}
    timesteps = torch.tensor([[0.0, 500.0, 1000.0]])
    velocity = run_ours(ours, given, timesteps)
    out = theirs(
        given["latents"].transpose(1, 2), timesteps, given["text"], enable_diffusion_forcing=True, fps=[1]
    ).sample
    assert relative_error(velocity, out.transpose(1, 2)) <= 1e-5
    slower = CausalWanTransformer(replace(config, fps=16)).eval()
    slower.load_state_dict(ours.state_dict())
    assert relative_error(run_ours(slower, given, timesteps), velocity) > 1e-2


@torch.no_grad()
def test_frames_beyond_1024_equal_diffusers_with_a_longer_table() -> None:
    """1,030 frames of one token: the positions are computed, no table ends."""
    ours, theirs = twins(TINY, rope_max_seq_len=1040)
    given = inputs(TINY, frames=1030, grid=(1, 1))
    velocity = run_ours(ours, given, torch.full((2, 1030), 700.0), grid=(1, 1))
    assert relative_error(velocity, run_theirs(theirs, given, torch.full((2,), 700.0))) <= 1e-5


@torch.no_grad()
def test_diffusers_weights_load_through_the_table(pair: tuple[CausalWanTransformer, torch.nn.Module]) -> None:
    ours, theirs = pair
    fresh = CausalWanTransformer(ours.config)
    load_weights(fresh, theirs.state_dict())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


@torch.no_grad()
def test_numerics_in_bfloat16_are_as_exact_as_those_they_are_named_after() -> None:
    """Errors (root mean square) against float32, on weights that bfloat16 holds exactly.

    Two runs in bfloat16 cannot be compared number by number: one that is rounded the other way changes all after it.
    """
    config = replace(SIZES["i2v_head_dim_128"], num_layers=4)
    truth, theirs = twins(config)
    for parameter in truth.parameters():
        parameter.copy_(parameter.bfloat16())
    theirs.load_state_dict(to_diffusers_names(truth.state_dict(), config))
    given = inputs(config)
    timesteps = torch.tensor([[0.0, 500.0, 1000.0], [833.3, 625.0, 1.0]])
    exact = run_ours(truth, given, timesteps)

    # what diffusers leaves alone when it loads in bfloat16
    kept = set(diffusers.WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in theirs.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    half = {name: tensor.bfloat16() for name, tensor in given.items()}
    per_token = timesteps.repeat_interleave(GRID[0] * GRID[1], dim=1)
    times: dict[str, Tensor] = {}
    theirs.condition_embedder.register_forward_hook(lambda _, args, out: times.update(theirs=out[0]))
    errors = {"theirs": rms(run_theirs(theirs, half, per_token) - exact)}
    for numerics in ("wan", "diffusers", "self_forcing"):
        model = CausalWanTransformer(replace(config, numerics=numerics)).eval()
        model.load_state_dict(truth.state_dict())
        model.bfloat16()
        times[numerics] = model._embed_time(timesteps, None)
        errors[numerics] = rms(run_ours(model, half, timesteps) - exact)
    assert 0.85 < errors["diffusers"] / errors["theirs"] < 1.15
    assert errors["wan"] < 0.6 * errors["diffusers"]  # 0.45: the stream is not rounded
    assert errors["wan"] < errors["self_forcing"] < 2 * errors["theirs"]

    def flipped(numerics: str) -> float:
        """Share of the time embedding that bfloat16 rounds otherwise than diffusers does; theirs are float32 waves."""
        per_frame = times["theirs"][:, :: GRID[0] * GRID[1]]
        return (times[numerics].bfloat16() != per_frame).float().mean().item()

    assert times["wan"].dtype == torch.float32
    assert flipped("diffusers") < 0.01 and flipped("wan") < 0.01
    assert flipped("self_forcing") > 0.1


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
