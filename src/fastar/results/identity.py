"""Which runs are the same run: a short hash of everything that changes the result, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

SCHEMA_VERSION = 1
"""Version of the stored rows and of the meaning of the metrics. Raise it when old and new results do not compare."""

EXCLUDED_GROUPS = ("paths", "launcher", "logger", "hydra")
"""Config groups that say where and how a run is executed, not what it computes."""

_ID_LENGTH = 12


def recorded_config(config: DictConfig | Mapping[str, Any], *, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The part of a config that changes the result: resolved, without where and how it runs.

    Groups in `EXCLUDED_GROUPS`, and top-level keys in `exclude`, are left out. Values elsewhere that are made from them
    keep a placeholder: `${paths.checkpoints}/doom` becomes `<paths.checkpoints>/doom` on every machine. (For a plain
    mapping, whose interpolations are already resolved, only the groups themselves can be left out.)

    Raises:
        ValueError: the config holds something that is neither a mapping, a list, a string, a number, a bool nor None.
    """
    dropped = {*EXCLUDED_GROUPS, *exclude}
    if isinstance(config, DictConfig):
        neutral = OmegaConf.to_container(config, resolve=False)
        assert isinstance(neutral, dict)
        for group in dropped & neutral.keys():
            neutral[group] = _placeholders(neutral[group], str(group))
        config = OmegaConf.create(neutral)
        # only what is kept is resolved, so an interpolation that needs Hydra at run time may stand in a left-out group
        resolved = {str(key): _resolved(config, str(key)) for key in config if key not in dropped}
    else:
        resolved = {str(key): value for key, value in config.items() if key not in dropped}
    return {key: _plain(value, key) for key, value in resolved.items()}


def run_id(
    config: DictConfig | Mapping[str, Any],
    *,
    seed: int | Sequence[int],
    checkpoint_sha256: str | None = None,
    timing_device: str | None = None,
    exclude: Sequence[str] = (),
) -> str:
    """Twelve hexadecimal digits that name a result.

    Args:
        config: the run's config; see `recorded_config` for what of it counts.
        seed: seed or seeds of this run. The config's top-level `seed` and `seeds` are what an experiment iterates
            over and do not count.
        checkpoint_sha256: of the weights; the path they were loaded from does not count.
        timing_device: name of the device when the run's timings are its result, else None.
        exclude: further top-level keys that do not change the result.
    """
    identity = {
        "config": recorded_config(config, exclude=("seed", "seeds", *exclude)),
        "seed": list(seed) if isinstance(seed, Sequence) else [seed],
        "checkpoint": checkpoint_sha256,
        "device": timing_device,
        "schema": SCHEMA_VERSION,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_ID_LENGTH]


def _placeholders(node: Any, path: str) -> Any:
    if isinstance(node, Mapping):
        return {key: _placeholders(value, f"{path}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_placeholders(value, f"{path}[{i}]") for i, value in enumerate(node)]
    return f"<{path}>"


def _resolved(config: DictConfig, key: str) -> Any:
    value = config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _plain(value: Any, path: str) -> Any:
    """JSON-able, with one spelling per value: 1 and 1.0 are the same setting."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{path} is a {type(value).__name__}: a config may hold mappings, lists, text, numbers and null only"
    )
