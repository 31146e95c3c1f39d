"""Fused passes against eager ones, on the same parameters, and what fused execution refuses."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastar.attention.context import Stream
from fastar.backbones.reference import BlockCausalAttend
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.config import ActionModuleConfig
from fastar.backbones.wan.fused import Execution, fuse
from fastar.backbones.wan.launch import EIGHT_BITS, Quantised, quantise, residual_norm, rms_norm_
from fastar.backbones.wan.linears import Fp8Linear, Linear, Linears, multiplies_fp8
from fastar.cache import TempCache
from tests.hopper import compile_apart
from tests.small import run, small_backbone, small_rollout

pytest.importorskip("triton")

TINY = WanConfig(dim=24, num_layers=2, num_heads=2, ffn_dim=40, freq_dim=16, text_dim=20, text_len=6)
CONFIGS = {
    "text": TINY,
    "no text": replace(TINY, text_dim=None, text_len=None, num_actions=5),
    "text and image": replace(TINY, in_channels=36, image_dim=12),
    "frame rate": replace(TINY, fps=24),
    "rays": replace(TINY, num_actions=2, action_motions=((0, 0), (1, 30))),
}
TRUE_WIDTH = WanConfig(
    dim=1536, num_layers=2, num_heads=12, ffn_dim=8960, text_dim=64, text_len=32, numerics="self_forcing"
)
FRAMES, GRID = 3, (2, 3)


@pytest.fixture(autouse=True)
def _device_that_triton_takes(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")


@torch.inference_mode(False)
def random_model(config: WanConfig, device: torch.device, dtype: torch.dtype) -> CausalWanTransformer:
    """Every parameter away from its start, so that activations stay near 1 and nothing is zero."""
    model = CausalWanTransformer(config).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1 or "modulation" in name:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.to(dtype)


def inputs(
    config: WanConfig, device: torch.device, dtype: torch.dtype, grid: tuple[int, int] = GRID, batch: int = 2
) -> dict[str, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape).to(device, dtype)

    size = (2 * grid[0], 2 * grid[1])
    given = {"latents": draw(FRAMES, 16, *size), "timesteps": 1000 * torch.rand(batch, FRAMES, device=device)}
    if config.text_dim is not None:
        given["text"] = draw(5, config.text_dim)
    if config.image_dim is not None:
        given |= {"image": draw(4, config.image_dim), "condition": draw(FRAMES, 20, *size)}
    if config.num_actions is not None:
        given["actions"] = torch.randint(config.num_actions, (batch, FRAMES), device=device)
    if config.action_motions is not None:
        given["poses"] = 10 * torch.rand(batch, FRAMES, 3, device=device)
    return given


class ByToken:
    """Attention whose result lies in memory token by token, as some engines leave it; its inputs may be views."""

    def __init__(self, model: CausalWanTransformer, grid: tuple[int, int]) -> None:
        self.attend = BlockCausalAttend(rope=model.rope, grid=grid, chunk_frames=2)

    def __call__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(stream, layer, q, k, v).transpose(1, 2).contiguous().transpose(1, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_fused_equals_eager_in_float32(name: str, device: torch.device) -> None:
    model, given = (
        random_model(CONFIGS[name], device, torch.float32),
        inputs(CONFIGS[name], device, torch.float32),
    )
    plain = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    expected = model(**given, attend=plain)
    fuse(model)
    for attend in (plain, ByToken(model, GRID)):
        torch.testing.assert_close(model(**given, attend=attend), expected, rtol=1e-4, atol=2e-5)
    model.fused = None
    torch.testing.assert_close(model(**given, attend=plain), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numerics", ["self_forcing", "wan", "diffusers"])
@torch.inference_mode()
def test_in_bfloat16_fused_is_as_near_to_float32_as_eager(numerics: str, device: torch.device) -> None:
    config = replace(TINY, numerics=numerics)
    with torch.inference_mode(False):
        model = random_model(config, device, torch.bfloat16)
        exact = copy.deepcopy(model).float()
    given = inputs(config, device, torch.bfloat16)
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    precise = {n: x.float() if x.is_floating_point() else x for n, x in given.items()}
    expected, eager = exact(**precise, attend=attend), model(**given, attend=attend)
    fused = fuse(model)(**given, attend=attend)
    assert fused.dtype == eager.dtype
    assert relative(fused, eager) < 0.02
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it
    assert relative(fused, expected) < (1.1 if device.type == "cuda" else 1.6) * relative(eager, expected)


def test_a_rollout_is_the_same_fused() -> None:
    """With rays, and a cache that keeps views of what a pass made until the pass ends."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")
    backbone, videos = small_backbone(), []
    for execution in (Execution(), Execution(fused=True)):
        execution.apply(backbone.transformer)
        rollout = small_rollout(backbone, lambda: TempCache(budget_frames=5, storage="float32"))
        videos.append(run(rollout, history=6, generated=4))
    torch.testing.assert_close(videos[1], videos[0], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_prompt_projected_once_is_read_as_it_is(device: torch.device) -> None:
    model, given = random_model(TINY, device, torch.float32), inputs(TINY, device, torch.float32)
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    expected = fuse(model)(**given, attend=attend)
    given["text"] = model.project_text(given["text"])  # type: ignore[assignment]
    torch.testing.assert_close(model(**given, attend=attend), expected)


@torch.inference_mode()
def test_keys_of_attention_are_normalised_and_not_turned_and_values_are_values(device: torch.device) -> None:
    """What an attention state is given, raw, is what it is given by an eager pass."""
    model, given = random_model(TINY, device, torch.float32), inputs(TINY, device, torch.float32)
    seen: list[list[Tensor]] = []

    def attend(stream: Stream, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append([q, k, v])
        return v if stream == "self" else torch.zeros_like(q)

    model(**given, attend=attend)
    fuse(model)(**given, attend=attend)
    half = len(seen) // 2
    for eager, fused in zip(seen[:half], seen[half:], strict=True):
        for ours, theirs in zip(fused, eager, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_packed_weights_follow_those_that_are_loaded(device: torch.device) -> None:
    model, other = (random_model(TINY, device, torch.float32) for _ in range(2))
    given = inputs(TINY, device, torch.float32)
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    expected = other(**given, attend=attend)
    names = model.state_dict().keys()
    assert fuse(model).state_dict().keys() == names
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(**given, attend=attend), expected, rtol=1e-4, atol=2e-5)


def test_refusals() -> None:
    cpu = torch.device("cpu")
    model, given = random_model(TINY, cpu, torch.float32), inputs(TINY, cpu, torch.float32)
    attend = BlockCausalAttend(rope=model.rope, grid=GRID, chunk_frames=2)
    with pytest.raises(ValueError, match=r"needs a bfloat16 model.*use linears=model"):
        fuse(model, linears="fp8")
    if os.environ.get("TRITON_INTERPRET") == "1":
        fuse(model)
        with pytest.raises(ValueError, match="no gradients"):
            model(**given, attend=attend)
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match="autocast"),
        ):
            model(**given, attend=attend)
        with torch.no_grad(), pytest.raises(ValueError, match="moved after it was fused"):
            model.double()(**given, attend=attend)
    module = ActionModuleConfig(layers=1, num_heads=2, key_embedding=4)
    with pytest.raises(ValueError, match="no action module"):
        fuse(CausalWanTransformer(replace(TINY, action_module=module)))


def test_without_a_gpu_fused_execution_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalWanTransformer(TINY)
    monkeypatch.setattr("fastar.backbones.wan.launch.interpreted", lambda: False)
    with pytest.raises(ValueError, match="runs on a GPU, not on cpu"):
        fuse(model)
    monkeypatch.setattr("fastar.backbones.wan.launch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install triton"):
        fuse(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 100])
def test_residual_norm_of_each_kind(width: int, dtype: torch.dtype, device: torch.device) -> None:
    frames, tokens = 3, 4
    x, update = torch.randn(2, 2 * frames * tokens, width).to(device, dtype)
    per_frame = torch.randn(2, frames, 6, width).to(device, dtype)
    own = torch.randn(2, width).to(device, dtype)

    def by_token(t: Tensor) -> Tensor:
        return t.float().flatten(0, 1).repeat_interleave(tokens, 0)

    for added, gate in ((None, None), (update, None), (update, per_frame[:, :, 2])):
        for shift, scale in ((per_frame[:, :, 0], per_frame[:, :, 1]), (own[0], own[1])):
            stream, expected = x.clone(), x.float()
            if added is not None:
                expected = expected + added.float() * (1 if gate is None else by_token(gate))
            found = residual_norm(stream, added, gate, shift, scale, eps=1e-6)
            torch.testing.assert_close(stream, expected.to(dtype))
            normed = functional.layer_norm(stream.float(), (width,), eps=1e-6)
            if shift.dim() == 3:
                normed = normed * (1 + by_token(scale)) + by_token(shift)
            else:
                normed = normed * scale.float() + shift.float()
            assert isinstance(found, Tensor)
            torch.testing.assert_close(found, normed.to(dtype))
            if device.type == "cpu" or multiplies_fp8(device):
                eight = residual_norm(x.clone(), added, gate, shift, scale, eps=1e-6, dtype=EIGHT_BITS)
                assert_eight_bits(eight, normed)


def assert_eight_bits(found: Tensor | Quantised, expected: Tensor) -> None:
    """To within half a step of e4m3 (2^-4 of a number, and the smallest step of the row's scale)."""
    assert isinstance(found, Quantised) and found.values.dtype == EIGHT_BITS
    back = found.values.float() * found.scales
    step = (expected.abs() / 16).maximum(found.scales / 512)
    assert ((back - expected).abs() <= 1.01 * step + 1e-6).all()
    assert torch.allclose(found.scales[:, 0] * 448, expected.abs().amax(1), rtol=0.01)


def test_rms_norm_of_parts_leaves_the_rest(device: torch.device) -> None:
    x, weights = torch.randn(5, 3 * 20).to(device), torch.randn(2, 20).to(device)
    before = x.clone()
    rms_norm_(x, weights, eps=1e-6)
    for part in range(2):
        held = slice(20 * part, 20 * part + 20)
        torch.testing.assert_close(
            x[:, held], functional.rms_norm(before[:, held], (20,), weights[part], 1e-6)
        )
    assert torch.equal(x[:, 40:], before[:, 40:])


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter's sigmoid, which is 0 there
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_in_8_bits(gelu: bool, device: torch.device) -> None:
    if device.type == "cuda" and not multiplies_fp8(device):
        pytest.skip("no 8-bit numbers on this GPU")
    x = (torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]).to(device)
    x[3] = 0
    expected = functional.gelu(x, approximate="tanh") if gelu else x
    found = quantise(x, gelu=gelu)
    assert (found.values[3].float() == 0).all()
    alive = [row for row in range(7) if row != 3]
    assert_eight_bits(Quantised(found.values[alive], found.scales[alive]), expected[alive])


def test_linears_in_8_bits_err_by_what_eight_bits_cost(device: torch.device) -> None:
    """Products of random numbers rounded to e4m3 err by a few hundredths, on each side the same."""
    if device.type == "cuda" and not multiplies_fp8(device):
        pytest.skip("no 8-bit products on this GPU")
    x = torch.randn(48, 256).to(device, torch.bfloat16)
    weight, bias = (torch.randn(64, 256) / 16).to(x), torch.randn(64).to(x)
    eight, plain = Fp8Linear(weight, bias), Linear(weight, bias)
    expected = functional.linear(x.float(), weight.float(), bias.float())
    assert 0.01 < relative(eight(x), expected) < 0.05
    hidden = eight.hidden(x)
    assert isinstance(hidden, Quantised)
    activated = functional.gelu(expected, approximate="tanh")
    assert relative(hidden.values.float() * hidden.scales, activated) < 0.07
    assert relative(plain.hidden(x), activated) < 0.01  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_epilogues_gelu_is_the_tanh_form() -> None:
    """The forms differ by 5e-4, ten times what is allowed here."""
    cuda = torch.device("cuda")
    x, weight, bias = (torch.randn(*size, device=cuda) for size in ((256, 64), (128, 64), (128,)))
    weight /= 8
    expected = functional.gelu(
        functional.linear(x.double(), weight.double(), bias.double()), approximate="tanh"
    )
    found = Linear(weight, bias).hidden(x)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("linears", "limit"), [("model", 0.02), ("fp8", 0.06)])
@torch.inference_mode()
def test_at_true_width_fused_is_near_eager_and_can_be_captured(linears: Linears, limit: float) -> None:
    cuda, grid = torch.device("cuda"), (6, 10)
    if linears == "fp8" and not multiplies_fp8(cuda):
        pytest.skip("no 8-bit products on this GPU")
    model = random_model(TRUE_WIDTH, cuda, torch.bfloat16)
    given = inputs(TRUE_WIDTH, cuda, torch.bfloat16, grid=grid, batch=1)
    attend = BlockCausalAttend(rope=model.rope, grid=grid, chunk_frames=3)
    expected = model(**given, attend=attend)
    fuse(model, linears)
    found = model(**given, attend=attend)
    assert relative(found, expected) < limit
    if linears == "fp8":
        assert relative(found, expected) > 0.015  # it was in 8 bits
    given["text"] = model.project_text(given["text"])  # type: ignore[assignment]
    for _ in range(2):
        model(**given, attend=attend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(**given, attend=attend)
    given["latents"].copy_(torch.randn_like(given["latents"]))
    graph.replay()
    assert relative(captured, model(**given, attend=attend)) < 0.005


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Those of placing, too. Needs no GPU."""
    assert compile_apart("tests.backbones.compile_wan_kernels", tmp_path) == 14
