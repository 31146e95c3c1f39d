"""LoRA files: both ways to name factors, both namings of modules, scales, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.keys import load_weights, to_diffusers_names
from fastar.backbones.wan.lora import merge_lora
from tests.backbones.test_wan_keys import WAN_1_3B

CONFIG = WanConfig(dim=24, num_layers=2, num_heads=2, ffn_dim=32, text_dim=8)
RANK = 3
TARGETS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2")  # 24x24, 24x24, 24x32
DIFFUSERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in CausalWanTransformer(CONFIG).named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of each target."""
    generator, state = torch.Generator().manual_seed(1), weights()
    made = {}
    for name in TARGETS:
        out, into = state[f"{name}.weight"].shape
        made[name] = (
            torch.randn(RANK, into, generator=generator),
            torch.randn(out, RANK, generator=generator),
        )
    return made


def file(name_of: Callable[[str, str], str], targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """A LoRA file; `name_of(module, factor)` names the tensors."""
    pairs = zip(targets, factors().values(), strict=True)
    return {name_of(name, f): t for name, both in pairs for f, t in zip("AB", both, strict=True)}


def peft(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


NAMINGS: dict[str, tuple[Callable[[str, str], str], tuple[str, ...]]] = {
    "peft": (peft, TARGETS),
    "adapter": (lambda m, f: f"base_model.model.model.{m}.lora_{f}.default.weight", TARGETS),
    "fsdp": (lambda m, f: f"model._fsdp_wrapped_module.{m.replace('.', '._fsdp_wrapped_module.', 1)}"
             f".lora_{f}.weight", TARGETS),
    "down_up": (lambda m, f: f"diffusion_model.{m}.lora_{ {'A': 'down', 'B': 'up'}[f] }.weight", TARGETS),
    "diffusers": (lambda m, f: f"transformer.{m}.lora_{f}.weight", DIFFUSERS),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_the_targets_get_b_times_a_and_nothing_else_changes(naming: str, nested: bool) -> None:
    state, lora = weights(), file(*NAMINGS[naming])
    merged = merge_lora(state, {"generator_lora": lora, "step": 7} if nested else lora, CONFIG)
    expected = dict(state)
    for name, (a, b) in factors().items():
        expected[f"{name}.weight"] = state[f"{name}.weight"] + b @ a
        assert (b @ a).abs().max() > 1
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    load_weights(CausalWanTransformer(CONFIG), merged)


def test_alpha_over_rank_is_the_scale_and_the_files_own_alpha_counts() -> None:
    state, lora = weights(), file(peft)
    lora["base_model.model.blocks.1.ffn.2.alpha"] = torch.tensor(6.0)
    scales = {TARGETS[0]: 1.5 / RANK, TARGETS[1]: 1.5 / RANK, TARGETS[2]: 6.0 / RANK}
    merged = merge_lora(to_diffusers_names(state, CONFIG), lora, CONFIG, alpha=1.5)
    for name, (a, b) in factors().items():
        expected = state[f"{name}.weight"] + scales[name] * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)


def test_longlives_file_fits_the_1_3b_model() -> None:
    """Rank 256 in every linear layer of the 30 blocks: 300 pairs, named as PEFT names them."""
    with torch.device("meta"):
        model = CausalWanTransformer(WAN_1_3B)
        lora = {
            peft(name, factor): torch.empty(shape)
            for name, layer in model.named_modules()
            if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear)
            for factor, shape in (("A", (256, layer.in_features)), ("B", (layer.out_features, 256)))
        }
    assert len(lora) == 600
    merged = merge_lora(model.state_dict(), {"generator_lora": lora}, WAN_1_3B, alpha=256)
    assert {name: t.shape for name, t in merged.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_a_bfloat16_weight_is_rounded_once() -> None:
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    merged = merge_lora(state, file(peft), CONFIG)
    for name, (a, b) in factors().items():
        expected = (state[f"{name}.weight"].float() + b @ a).bfloat16()
        assert torch.equal(merged[f"{name}.weight"], expected)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    state, lora = weights(), file(peft)
    half = {name: tensor for name, tensor in lora.items() if name != peft(TARGETS[1], "B")}
    with pytest.raises(
        ValueError, match=r"first missing B beside .*blocks\.1\.cross_attn\.o\.lora_A\.weight"
    ):
        merge_lora(state, half, CONFIG)
    elsewhere = lora | {
        peft("blocks.2.ffn.2", "A"): torch.zeros(3, 32),
        "blocks.0.ffn.0.diff": torch.zeros(1),
    }
    with pytest.raises(
        ValueError, match=r"missing none, first unexpected .*blocks\.2\.ffn\.2\.lora_A\.weight"
    ):
        merge_lora(state, elsewhere, CONFIG)
    twice = lora | {f"{TARGETS[0]}.lora_down.weight": torch.zeros(3, 24)}
    with pytest.raises(
        ValueError, match=r"missing none, first unexpected blocks\.0\.self_attn\.q\.lora_down"
    ):
        merge_lora(state, twice, CONFIG)
    with pytest.raises(ValueError, match=r"\(0 tensors\) does not fit"):
        merge_lora(state, {"generator_lora": {}}, CONFIG)
    with pytest.raises(
        ValueError, match=r"B \(24, 3\) times A \(3, 25\) .* do not make blocks\.0\.self_attn\.q"
    ):
        merge_lora(state, lora | {peft(TARGETS[0], "A"): torch.zeros(3, 25)}, CONFIG)
    with pytest.raises(ValueError, match="A of rank 2 and B of rank 3"):
        merge_lora(state, lora | {peft(TARGETS[0], "A"): torch.zeros(2, 24)}, CONFIG)
