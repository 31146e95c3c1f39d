"""The key table: contract of 825 names for Wan2.1-1.3B, both namings, containers, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.backbones.base import Backbone, BackboneConfig
from fastar.backbones.wan import CausalWanTransformer, WanConfig
from fastar.backbones.wan.config import ActionModuleConfig
from fastar.backbones.wan.keys import (
    key_pairs,
    load_weights,
    strip_prefixes,
    to_diffusers_names,
    to_wan_names,
    unwrap_container,
)
from tests.small import configs, make

WAN_1_3B = WanConfig(dim=1536, num_layers=30, num_heads=12, ffn_dim=8960, text_dim=4096, text_len=512)
SMALL = WanConfig(dim=24, num_layers=2, num_heads=2, ffn_dim=32, text_dim=8)
PUBLIC = {  # conf/backbone: tensors, parameters
    "wan_1_3b": (27 * 30 + 15, 1_418_996_800),
    "wan_14b": (27 * 40 + 15, 14_288_491_584),
    "wan_i2v_14b": (32 * 40 + 15 + 8, 16_394_878_784),
    "skyreels_v2_df_1_3b": (27 * 30 + 15 + 5, 1_435_525_696),
    "matrix_game_2": (27 * 30 + 11 + 8 + 19 * 15, 1_619_242_304),
}


def diffusers_sizes(config: WanConfig) -> dict[str, Any]:
    """What diffusers calls the sizes of a config."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
    }


def random_state(config: WanConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = CausalWanTransformer(config)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def test_1_3b_has_825_tensors_and_1_418_996_800_parameters() -> None:
    with torch.device("meta"):
        model = CausalWanTransformer(WAN_1_3B)
    state = model.state_dict()
    assert len(state) == 825
    assert sum(tensor.numel() for tensor in state.values()) == 1_418_996_800
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 46_440_704
    assert set(state) == {ours for ours, _ in key_pairs(WAN_1_3B)}
    assert len({theirs for _, theirs in key_pairs(WAN_1_3B)}) == 825


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embedding.weight", (1536, 16, 1, 2, 2)),
        ("text_embedding.0.weight", (1536, 4096)),
        ("time_embedding.0.weight", (1536, 256)),
        ("time_projection.1.weight", (9216, 1536)),
        ("blocks.29.modulation", (1, 6, 1536)),
        ("blocks.7.cross_attn.norm_k.weight", (1536,)),
        ("blocks.7.ffn.0.weight", (8960, 1536)),
        ("head.head.weight", (64, 1536)),
        ("head.modulation", (1, 2, 1536)),
    ],
)
def test_1_3b_shapes_are_those_of_the_checkpoint(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert CausalWanTransformer(WAN_1_3B).state_dict()[name].shape == shape


def test_the_affine_norm_changes_its_number_between_the_namings() -> None:
    pairs = dict(key_pairs(SMALL))
    assert pairs["blocks.1.norm3.weight"] == "blocks.1.norm2.weight"
    assert pairs["blocks.0.self_attn.o.bias"] == "blocks.0.attn1.to_out.0.bias"
    assert pairs["head.modulation"] == "scale_shift_table"
    assert pairs["blocks.1.modulation"] == "blocks.1.scale_shift_table"


def small_module(mouse_dim: int = 2) -> ActionModuleConfig:
    return ActionModuleConfig(layers=1, mouse_dim=mouse_dim, num_heads=2, key_embedding=4)


@pytest.mark.parametrize(
    "actions",
    [
        {},
        {"num_actions": 5},
        {"action_module": small_module()},
        {"action_module": small_module(0)},
        {"fps": 24},
    ],
)
@pytest.mark.parametrize("image_dim", [None, 6])
@pytest.mark.parametrize("text_dim", [None, 8])
def test_names_of_every_variant_are_the_models_own(
    text_dim: int | None, image_dim: int | None, actions: dict[str, Any]
) -> None:
    config = replace(SMALL, text_dim=text_dim, image_dim=image_dim, **actions)
    names = [ours for ours, _ in key_pairs(config)]
    assert sorted(names) == sorted(CausalWanTransformer(config).state_dict())


@pytest.fixture(scope="module")
def public() -> dict[str, Backbone]:
    """The published models, without memory."""
    made = configs("backbone")
    return {name: make(made[name], device="meta") for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_their_tensors_and_both_namings_round_trip(
    public: dict[str, Backbone], name: str
) -> None:
    config, state = public[name].config, public[name].transformer.state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == PUBLIC[name]
    theirs = to_diffusers_names(state, config.transformer)
    assert len(theirs) == len(state) and "blocks.3.attn2.to_out.0.bias" in theirs
    back = to_wan_names(theirs, config.transformer)
    assert back.keys() == state.keys() and all(back[key] is state[key] for key in state)
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


GEOMETRY = {  # tokens a frame, frames a chunk, frames that it was trained on or is published with
    "wan_1_3b": (1560, 3, 21),
    "wan_14b": (1560, 3, 21),
    "wan_i2v_14b": (1560, 3, 21),
    "skyreels_v2_df_1_3b": (2040, 5, 25),
    "matrix_game_2": (880, 3, 6),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_no_tensor_tells_is_as_published(public: dict[str, Backbone], name: str) -> None:
    """Weights of another head size, prompt length or picture would load all the same."""
    config = public[name].config
    sizes = config.transformer
    assert (config.tokens_per_frame, config.chunk_frames, config.context_frames) == GEOMETRY[name]
    assert (sizes.head_dim, sizes.freq_dim, sizes.patch, sizes.eps, sizes.rope_theta) == (
        128,
        256,
        2,
        1e-6,
        1e4,
    )
    assert sizes.text_len == (None if name == "matrix_game_2" else 512)
    assert sizes.fps == (24 if name == "skyreels_v2_df_1_3b" else None)
    assert sizes.numerics == ("self_forcing" if name == "matrix_game_2" else "wan")
    if (module := sizes.action_module) is not None:
        assert (module.num_heads, module.head_dim, module.rope_dims, module.rope_theta) == (
            16,
            64,
            (8, 28, 28),
            256,
        )
        assert (module.window_frames, module.pixel_frames, module.attention_frames, module.eps) == (
            3,
            4,
            6,
            1e-6,
        )


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_i2v_14b", "skyreels_v2_df_1_3b"])
def test_diffusers_has_the_same_tensors(public: dict[str, Backbone], name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = public[name].config.transformer
    with torch.device("meta"):
        if config.fps is None:
            theirs = diffusers.WanTransformer3DModel(**diffusers_sizes(config)).state_dict()
        else:
            theirs = diffusers.SkyReelsV2Transformer3DModel(
                **diffusers_sizes(config), inject_sample_info=True
            ).state_dict()
    ours = to_diffusers_names(public[name].transformer.state_dict(), config)
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_matrix_game_shapes_are_those_of_the_checkpoint(public: dict[str, Backbone]) -> None:
    state = public["matrix_game_2"].transformer.state_dict()
    shapes = {
        "patch_embedding.weight": (1536, 36, 1, 2, 2),
        "img_emb.proj.1.weight": (1280, 1280),
        "img_emb.proj.4.bias": (1536,),
        "blocks.29.cross_attn.k.weight": (1536, 1536),
        "blocks.14.action_model.mouse_mlp.0.weight": (1024, 1536 + 24),
        "blocks.0.action_model.mouse_mlp.3.weight": (1024,),
        "blocks.0.action_model.t_qkv.weight": (3072, 1024),
        "blocks.0.action_model.img_attn_k_norm.weight": (64,),
        "blocks.0.action_model.proj_mouse.weight": (1536, 1024),
        "blocks.0.action_model.keyboard_embed.0.weight": (128, 4),
        "blocks.0.action_model.keyboard_attn_kv.weight": (2048, 1536),
        "blocks.0.action_model.mouse_attn_q.weight": (1024, 1536),
        "head.head.weight": (64, 1536),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not {"blocks.0.cross_attn.k_img.weight", "text_embedding.0.weight"} & state.keys()
    assert "blocks.15.action_model.t_qkv.weight" not in state


def test_both_namings_round_trip() -> None:
    state = random_state(SMALL)
    theirs = to_diffusers_names(state, SMALL)
    assert not set(theirs) & {"head.head.weight", "blocks.0.self_attn.q.weight"}
    back = to_wan_names(theirs, SMALL)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_trainer_prefixes_and_containers_are_taken_off() -> None:
    state = random_state(SMALL)
    average = {
        name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): tensor + 1
        for name, tensor in state.items()
    }
    file = {
        "generator": {f"model.{name}": tensor for name, tensor in state.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in average.items()},
    }
    model = CausalWanTransformer(SMALL)
    load_weights(model, unwrap_container(file))
    assert torch.equal(model.blocks[0].ffn[0].weight, state["blocks.0.ffn.0.weight"] + 1)
    load_weights(model, unwrap_container(file, use_ema=False))
    assert torch.equal(model.blocks[0].ffn[0].weight, state["blocks.0.ffn.0.weight"])
    assert unwrap_container(state) is state
    assert strip_prefixes("model.head.head.bias") == "head.head.bias"
    wrapped = "generator.model._fsdp_wrapped_module.blocks.3._orig_mod.action_model.t_qkv.weight"
    assert strip_prefixes(wrapped) == "blocks.3.action_model.t_qkv.weight"


def test_unwanted_ema_only_file_is_refused() -> None:
    with pytest.raises(ValueError, match="EMA weights only"):
        unwrap_container({"generator_ema": random_state(SMALL)}, use_ema=False)


def test_missing_and_unexpected_names_are_listed_with_counts() -> None:
    state = random_state(SMALL)
    del state["blocks.1.ffn.2.bias"], state["head.modulation"]
    state["blocks.2.modulation"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"2 \(blocks\.1\.ffn\.2\.bias, head\.modulation\) missing") as error:
        to_wan_names(state, SMALL)
    assert "1 (blocks.2.modulation) unexpected" in str(error.value)


def test_a_name_that_is_there_twice_is_refused() -> None:
    state = random_state(SMALL)
    with pytest.raises(ValueError, match=r"more than one tensor of 1 \(head\.head\.bias\); keep one model"):
        to_wan_names(state | {"model.head.head.bias": torch.zeros(64)}, SMALL)


def test_a_wrong_shape_is_named_and_nothing_is_copied() -> None:
    model = CausalWanTransformer(SMALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = random_state(SMALL)
    state["head.head.weight"] = torch.zeros(64, 25)
    with pytest.raises(ValueError, match=r"head\.head\.weight is \(64, 25\) in the weights and \(64, 24\)"):
        load_weights(model, state)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
