"""Methods as configs name them (conf/method): from a node to fresh caches and selectors."""

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.cache import HeadErrors, ThresholdErrors, head_errors, threshold_errors
from fastar.rollout.method import Method

COMMON_BUDGET = "${budget_share}"
MEASURED: dict[str, type[HeadErrors] | type[ThresholdErrors]] = {
    "head_errors": HeadErrors,
    "threshold_errors": ThresholdErrors,
}
"""Settings of caches that name a file of what was measured once, by experiments/COMMANDS."""
COMMANDS = {"head_errors": head_errors.COMMAND, "threshold_errors": threshold_errors.COMMAND}
PARTS = ("cache", "self_attention", "cross_attention", "engine")

log = logging.getLogger(__name__)


def method_of(name: str, node: Mapping[str, Any]) -> Method:
    """The method of a resolved node with cache, self_attention, cross_attention and engine."""
    return Method(
        name=name,
        cache=partial(instantiate, node["cache"]),
        self_attention=partial(instantiate, node["self_attention"]),
        cross_attention=partial(instantiate, node["cross_attention"]),
        engine=instantiate(node["engine"]).name,
    )


def resolved(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Nodes of all methods in `config.methods` as plain values, in order.

    An experiment may name settings of methods that the command line's own method=[...] leaves out: so do we.

    Raises:
        ValueError: there are none.
    """
    if not config.get("methods"):
        raise ValueError("no method was asked for: name some, as in method=[dense,tempcache,window]")
    plain: Any = OmegaConf.to_container(config.methods, resolve=True)
    whole = {name: node for name, node in plain.items() if all(part in (node or {}) for part in PARTS)}
    if left := [name for name in plain if name not in whole]:
        log.warning("left out, as method=[...] does not name them: %s (settings alone)", ", ".join(left))
    if not whole:
        raise ValueError(f"method=[...] names none of {', '.join(plain)}: add those that are wanted")
    return whole


def identity_of(node: Mapping[str, Any], weights: str | None) -> dict[str, Any]:
    """What decides the numbers of a resolved node: itself, with the content of the file that it names, not its place.

    Raises:
        ValueError: the file is missing or damaged, or was measured on other weights than those of sha256 `weights`.
    """
    cache = dict(node["cache"])
    for name, kind in MEASURED.items():
        path = cache.get(name)
        if path is None:
            continue
        found = kind.load(path)
        if found.weights != weights:
            raise ValueError(
                f"{path} was measured on other weights ({str(found.weights)[:8]}, these are {str(weights)[:8]}): "
                f"measure it again with `python experiments/{COMMANDS[name]} checkpoint={Path(path).parent}`"
            )
        cache[name] = hashlib.sha256(repr(found.content).encode()).hexdigest()
    return {**node, "cache": cache}


def setting(node: Mapping[str, Any], path: str) -> str | int | float | bool | None:
    """What a resolved node says at a dotted path such as `cache.threshold`; None if it has no such setting.

    Raises:
        ValueError: it is a group of settings, which is no value for a column of a table.
    """
    found: Any = node
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, list):
        return ",".join(map(str, found))
    if path.endswith("_target_") and found is not None:
        return str(found).rpartition(".")[2]
    if isinstance(found, Mapping):
        raise ValueError(
            f"{path} is a group of settings ({', '.join(map(str, found))}): name one of them in columns"
        )
    return found


def budgeted(methods: DictConfig) -> set[str]:
    """Methods whose cache follows the common `budget_share`."""
    written: Any = OmegaConf.to_container(methods, resolve=False)
    caches = {name: (node or {}).get("cache", {}) for name, node in written.items()}
    return {name for name, cache in caches.items() if cache.get("budget_share") == COMMON_BUDGET}
