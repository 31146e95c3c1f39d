"""LoRA files (Hu et al. 2021) of Wan transformers: low-rank updates, merged into the weights before a rollout.

A file holds two factors for each weight W [out, in] that it changes, A [rank, in] and B [out, rank]; merged, the weight
is W + alpha / rank * B A. PEFT calls them `lora_A` and `lora_B`, others `lora_down` and `lora_up`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.keys import key_pairs, strip_prefixes, to_wan_names

CONTAINER = "generator_lora"  # of LongLive's .pt file
# PEFT puts the adapter's name ("default") before the ending while the model is wrapped.
NAME = re.compile(r"(?P<module>.+)\.(?:lora_(?P<factor>A|B|down|up)(?:\.[^.]+)?\.weight|alpha)")
FACTORS = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}

Update = dict[str, tuple[str, Tensor]]
"""What a file holds for one weight: by A, B and alpha, the name in the file and the tensor."""


def merge_lora(
    state: Mapping[str, Tensor],
    lora: Mapping[str, object],
    config: WanConfig,
    *,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """`state` with the updates of `lora` merged in: a new state dict under Wan's names, each weight in its own dtype.

    Args:
        state: weights of a transformer of `config`, in either naming.
        lora: contents of the file, in either naming, maybe nested under `generator_lora`.
        alpha: of updates whose alpha the file does not hold; None: their rank, so that they are added as they are
            (LongLive: rank 256, alpha 256).

    Raises:
        ValueError: a factor without its other half, a name that is no factor of a weight, or shapes that do not fit.
    """
    merged = to_wan_names(state, config)
    for name, update in _updates(lora, config).items():
        weight, (_, down), (_, up) = merged[name], update["A"], update["B"]
        if down.dim() != 2 or up.dim() != 2 or (len(up), *down.shape[1:]) != weight.shape:
            raise ValueError(
                f"B {tuple(up.shape)} times A {tuple(down.shape)} of the LoRA do not make {name} "
                f"{tuple(weight.shape)}; merge it into the model it was trained on."
            )
        rank = len(down)
        if up.shape[1] != rank:
            raise ValueError(
                f"The LoRA of {name} has A of rank {rank} and B of rank {up.shape[1]}; use a whole file."
            )
        own = update["alpha"][1].item() if "alpha" in update else alpha
        scale = 1.0 if own is None else own / rank
        delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        merged[name] = weight.float().add(delta, alpha=scale).to(weight.dtype)
    return merged


def _updates(lora: Mapping[str, object], config: WanConfig) -> dict[str, Update]:
    """The file's tensors by the Wan name of the weight that they change; ValueError if one does not find it."""
    inside = lora.get(CONTAINER)
    file = inside if isinstance(inside, Mapping) else lora
    own_names = {name: ours for ours, theirs in key_pairs(config) for name in (ours, theirs)}
    updates: dict[str, Update] = {}
    unexpected = []
    for name, tensor in file.items():
        parts = NAME.fullmatch(name)
        weight = None if parts is None else own_names.get(strip_prefixes(parts["module"]) + ".weight")
        factor = None if parts is None else FACTORS[parts["factor"]]
        known = {} if weight is None else updates.get(weight, {})
        if factor is None or weight is None or factor in known or not isinstance(tensor, Tensor):
            unexpected.append(name)
        else:
            updates.setdefault(weight, {})[factor] = (name, tensor)
    missing = [
        f"{factor} beside {next(iter(update.values()))[0]}"
        for update in updates.values()
        for factor in ("A", "B")
        if factor not in update
    ]
    if missing or unexpected or not updates:
        raise ValueError(
            f"The LoRA file ({len(file)} tensors) does not fit the transformer: first missing "
            f"{missing[0] if missing else 'none'}, first unexpected {unexpected[0] if unexpected else 'none'}; "
            "merge it into the model it was trained on."
        )
    return updates
