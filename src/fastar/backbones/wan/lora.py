"""LoRA files (Hu et al. 2021) of Wan transformers: low-rank updates, merged into the weights before a rollout.

A file holds two factors for each weight W [out, in] that it changes, A [rank, in] and B [out, rank]; merged, the weight is
W + alpha / rank * B A. PEFT calls them `lora_A` and `lora_B`, others `lora_down` and `lora_up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastar.backbones.wan.config import WanConfig
from fastar.backbones.wan.keys import key_pairs, strip_prefixes, to_wan_names

CONTAINER = "generator_lora"  # of LongLive's .pt file
# Endings of a name: the factor they say it is. PEFT may name the adapter in between ("default").
FACTORS = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}


@dataclass
class _Update:
    names: dict[str, str] = field(default_factory=dict)  # of what is held, as in the file
    held: dict[str, Tensor] = field(default_factory=dict)  # A, B, alpha


def merge_lora(
    state: Mapping[str, Tensor],
    lora: Mapping[str, object],
    config: WanConfig,
    *,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """`state` with the updates of `lora` merged in: a new state dict under Wan's names, in the weights' own dtypes.

    Args:
        state: weights of a transformer of `config`, in either naming.
        lora: contents of the file, in either naming, maybe nested under `generator_lora`.
        alpha: of updates whose alpha the file does not hold; None: their rank, so that they are added as they are
            (LongLive: rank 256, alpha 256).

    Raises:
        ValueError: a factor without its other half, a name that is no factor of a weight, or shapes that do not fit.
    """
    merged = to_wan_names(state, config)
    for name, update in _updates(lora, config, merged).items():
        weight, down, up = merged[name], update.held["A"], update.held["B"]
        if down.dim() != 2 or up.dim() != 2 or (*up.shape[:1], *down.shape[1:]) != weight.shape:
            raise ValueError(
                f"{update.names['B']} {tuple(up.shape)} times {update.names['A']} {tuple(down.shape)} do not make the "
                f"weight's {tuple(weight.shape)}; merge the LoRA into its own base model."
            )
        rank = down.shape[0]
        if up.shape[1] != rank:
            raise ValueError(
                f"{update.names['A']} is of rank {rank} and {update.names['B']} of rank {up.shape[1]}; use a whole file."
            )
        own = update.held.get("alpha")
        scale = (own.item() if own is not None else rank if alpha is None else alpha) / rank
        delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        merged[name] = weight.float().add(delta, alpha=scale).to(weight.dtype)
    return merged


def _updates(
    lora: Mapping[str, object], config: WanConfig, weights: Mapping[str, Tensor]
) -> dict[str, _Update]:
    """The file's tensors by the Wan name of the weight that they change."""
    inside = lora.get(CONTAINER)
    file = inside if isinstance(inside, Mapping) else lora
    own_of = {name: ours for pair in key_pairs(config) for ours in pair[:1] for name in pair}
    updates: dict[str, _Update] = {}
    unexpected = []
    for name, tensor in file.items():
        ending = next((e for e in FACTORS if name.endswith(e)), None)
        weight = own_of.get(strip_prefixes(name.removesuffix(ending)) + ".weight") if ending else None
        if weight is None or ending is None or weight not in weights or not isinstance(tensor, Tensor):
            unexpected.append(name)
            continue
        update = updates.setdefault(weight, _Update())
        update.names[FACTORS[ending]], update.held[FACTORS[ending]] = name, tensor
    missing = [
        f"the {factor} of {weight}"
        for weight, update in updates.items()
        for factor in ("A", "B")
        if factor not in update.held
    ]
    if unexpected or missing or not updates:
        raise ValueError(
            f"The LoRA file ({len(file)} tensors) does not fit the transformer: first missing "
            f"{missing[0] if missing else 'none'}, first unexpected {unexpected[0] if unexpected else 'none'}; "
            "merge it into the model it was trained on."
        )
    return updates
