"""Names of Wan's parameters in the two published namings, as one table, and strict loading under either.

Ours are the original Wan names; diffusers' are translated. No tensor is permuted or reshaped on the way:
rotary pairs are interleaved in both. Note the swap: Wan's affine norm3 (before cross-attention) is diffusers'
norm2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.transformer import CausalWanTransformer

Naming = Literal["wan", "diffusers"]

WEIGHT, BIAS, BOTH, BARE = (".weight",), (".bias",), (".weight", ".bias"), ("",)
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}

# Matrix-Game's action module; diffusers has none, files in its naming keep these names.
_ACTIONS = "blocks.{i}.action_model"
_KEYBOARD = {"keyboard_embed.0": BOTH, "keyboard_embed.2": BOTH} | dict.fromkeys(
    ("key_attn_q_norm", "key_attn_k_norm", "mouse_attn_q", "keyboard_attn_kv", "proj_keyboard"), WEIGHT
)
_MOUSE = {"mouse_mlp.0": BOTH, "mouse_mlp.2": BOTH, "mouse_mlp.3": BOTH} | dict.fromkeys(
    ("t_qkv", "img_attn_q_norm", "img_attn_k_norm", "proj_mouse"), WEIGHT
)

# (Wan's name, diffusers' name, endings); {i} is the block.
KEY_TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("patch_embedding", "patch_embedding", BOTH),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", BOTH),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", BOTH),
    *(
        (f"img_emb.proj.{ours}", f"condition_embedder.image_embedder.{theirs}", BOTH)
        for ours, theirs in (("0", "norm1"), ("1", "ff.net.0.proj"), ("3", "ff.net.2"), ("4", "norm2"))
    ),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", BOTH),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", BOTH),
    ("time_projection.1", "condition_embedder.time_proj", BOTH),
    ("fps_embedding", "fps_embedding", WEIGHT),
    ("fps_projection.0", "fps_projection.net.0.proj", BOTH),
    ("fps_projection.2", "fps_projection.net.2", BOTH),
    ("action_embedding", "action_embedding", WEIGHT),  # ours alone: Wan has no actions
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", BARE),
    *(
        (f"blocks.{{i}}.{ours}.{p}", f"blocks.{{i}}.{theirs}.{to_p}", BOTH)
        for ours, theirs in _ATTENTIONS.items()
        for p, to_p in _PROJECTIONS.items()
    ),
    *(
        (f"blocks.{{i}}.{ours}.{norm}", f"blocks.{{i}}.{theirs}.{norm}", WEIGHT)
        for ours, theirs in _ATTENTIONS.items()
        for norm in ("norm_q", "norm_k")
    ),
    ("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj", BOTH),
    ("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj", BOTH),
    ("blocks.{i}.cross_attn.norm_k_img", "blocks.{i}.attn2.norm_added_k", WEIGHT),
    *((f"blocks.{{i}}.self_attn.{ray}", f"blocks.{{i}}.attn1.{ray}", WEIGHT) for ray in ("ray_q", "ray_k")),
    ("blocks.{i}.norm3", "blocks.{i}.norm2", BOTH),
    *((f"{_ACTIONS}.{part}",) * 2 + (endings,) for part, endings in (_KEYBOARD | _MOUSE).items()),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", BOTH),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", BOTH),
    ("head.modulation", "scale_shift_table", BARE),
    ("head.head", "proj_out", BOTH),
)

CONTAINERS = ("generator_ema", "generator", "model")  # of Self-Forcing's and LongLive's .pt files
# What trainers and libraries put between the parts of a name, anywhere: ours have none of these parts.
WRAPPERS = frozenset(
    "model module generator transformer diffusion_model base_model _fsdp_wrapped_module _orig_mod "
    "_checkpoint_wrapped_module".split()
)


def key_pairs(config: WanConfig) -> list[tuple[str, str]]:
    """(Wan's name, diffusers' name) of every parameter that a transformer of this config has."""
    text, image, module = config.text_dim is not None, config.image_dim is not None, config.action_module
    absent = {
        part
        for part, present in (
            ("text_embedding", text),
            ("img_emb", image),
            ("cross_attn", text or image),
            ("norm3", text or image),
            *((part, text and image) for part in ("k_img", "v_img", "norm_k_img")),
            ("fps_embedding", config.fps is not None),
            ("fps_projection", config.fps is not None),
            ("action_embedding", config.num_actions is not None),
            ("action_model", module is not None),
            *((part.split(".")[0], module is not None and module.mouse_dim > 0) for part in _MOUSE),
            ("ray_q", config.action_motions is not None),
            ("ray_k", config.action_motions is not None),
        )
        if not present
    }

    def blocks_with(name: str) -> int:
        return module.layers if module is not None and "action_model" in name else config.num_layers

    return [
        (ours.format(i=i) + ending, theirs.format(i=i) + ending)
        for ours, theirs, endings in KEY_TABLE
        if absent.isdisjoint(ours.split("."))
        for i in range(blocks_with(ours) if "{i}" in ours else 1)
        for ending in endings
    ]


def naming_of(names: Iterable[str]) -> Naming:
    """Which naming a state dict uses, by the names that only one of them has."""
    return "diffusers" if any(n.startswith("condition_embedder.") for n in names) else "wan"


def strip_prefixes(name: str) -> str:
    """The parameter's name without what trainers wrap around it and its parts (`model.`, FSDP's module names)."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrap_container(checkpoint: Mapping[str, object], *, use_ema: bool = True) -> Mapping[str, Tensor]:
    """The generator's state dict in a training checkpoint, or the mapping itself if it is one already.

    `use_ema` prefers the averaged weights where the file has both. Raises ValueError if the file holds EMA
    weights only and they are not wanted.
    """
    held = [name for name in CONTAINERS if isinstance(checkpoint.get(name), Mapping)]
    if not held:
        return checkpoint  # type: ignore[return-value]
    wanted = [name for name in held if use_ema or name != "generator_ema"]
    if not wanted:
        raise ValueError("The checkpoint holds EMA weights only; load it with use_ema=True.")
    return checkpoint[wanted[0]]  # type: ignore[return-value]


def to_wan_names(state: Mapping[str, Tensor], config: WanConfig) -> dict[str, Tensor]:
    """A state dict in either naming, prefixes stripped, under Wan's names.

    Raises ValueError, naming the first few, if parameters of the config are missing or others are present, or if one
    is there twice under different prefixes.
    """
    stripped = {strip_prefixes(name): tensor for name, tensor in state.items()}
    if len(stripped) < len(state):
        twice = [name for name, times in Counter(map(strip_prefixes, state)).items() if times > 1]
        raise ValueError(
            f"The weights hold more than one tensor of {_first(twice)}; keep one model in the file."
        )
    naming = naming_of(stripped)
    own_of = {theirs if naming == "diffusers" else ours: ours for ours, theirs in key_pairs(config)}
    missing = [name for name in own_of if name not in stripped]
    unexpected = [name for name in stripped if name not in own_of]
    if missing or unexpected:
        raise ValueError(
            f"The weights ({len(stripped)} tensors in {naming} naming) do not fit the transformer "
            f"({len(own_of)} tensors): {_first(missing)} missing, {_first(unexpected)} unexpected; "
            "load them with their own config."
        )
    return {ours: stripped[name] for name, ours in own_of.items()}


def to_diffusers_names(state: Mapping[str, Tensor], config: WanConfig) -> dict[str, Tensor]:
    """A state dict in either naming under diffusers' names; errors as in `to_wan_names`."""
    own = to_wan_names(state, config)
    return {theirs: own[ours] for ours, theirs in key_pairs(config)}


@torch.no_grad()
def load_weights(model: CausalWanTransformer, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict in either naming into `model`.

    Raises ValueError, before anything is copied, on a name or shape that does not fit.
    """
    own = to_wan_names(state, model.config)
    parameters = dict(model.named_parameters())
    for name, tensor in own.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the weights and {tuple(parameters[name].shape)} in the "
                "transformer; load them with their own config."
            )
    for name, tensor in own.items():
        parameters[name].copy_(tensor)


def _first(names: list[str], shown: int = 3) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
