"""Methods as configs name them (conf/method): from a node to fresh caches and selectors."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastar.rollout.method import Method

COMMON_BUDGET = "${budget_share}"


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

    Raises:
        ValueError: there are none.
    """
    if not config.get("methods"):
        raise ValueError("no method was asked for: name some, as in method=[dense,tempcache,window]")
    plain: Any = OmegaConf.to_container(config.methods, resolve=True)
    return dict(plain)


def budgeted(methods: DictConfig) -> set[str]:
    """Methods whose cache follows the common `budget_share`."""
    written: Any = OmegaConf.to_container(methods, resolve=False)
    return {name for name, node in written.items() if node["cache"].get("budget_share") == COMMON_BUDGET}
