"""What configs may compute: `${layers_of:last_70,30}`."""

import re

from omegaconf import OmegaConf


def layers_of(choice: str, num_layers: int) -> list[int]:
    """Layers by name: `all`, or `first_70` and `last_70` for that percentage of them, rounded.

    Raises:
        ValueError: it is none of these.
    """
    if choice == "all":
        return list(range(num_layers))
    found = re.fullmatch(r"(first|last)_(\d+)", str(choice))
    if found is None or int(found[2]) > 100:
        raise ValueError(f"layers are named all, or first_70 and last_70 for a percentage, not '{choice}'")
    count = round(num_layers * int(found[2]) / 100)
    layers = list(range(num_layers))
    return layers[:count] if found[1] == "first" else layers[num_layers - count :]


def register() -> None:
    """Make the resolvers known to OmegaConf; a second time changes nothing."""
    OmegaConf.register_new_resolver("layers_of", layers_of, replace=True)
