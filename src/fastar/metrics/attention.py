"""Methods held against dense attention call by call: the same queries and current chunk, each with its own past."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastar.attention.state import AttendEvent, AttentionState
from fastar.cache.lineage import Lineage
from fastar.engines.reference import attention_weights
from fastar.metrics.recall import attention_recall, relative_output_error, spread_over_members


class AttentionProbe:
    """Recorder of a dense rollout that replays its self-attention calls in the states of other methods.

    Create it before the first commit. It looks while `active`; every layer and denoising step weighs the same.

    Args:
        states: of the methods, by name; their caches see the commits of the dense rollout (protocol A).

    Raises:
        ValueError: a cache does not keep tokens in slots, so that its tokens cannot be followed.
    """

    def __init__(self, states: Mapping[str, AttentionState]) -> None:
        self.states, self.active = states, False
        self._lineages = {name: Lineage() for name in states}
        for name, state in states.items():
            state.cache.follow(self._lineages[name])
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in states}

    def on_attend(self, event: AttendEvent) -> None:
        """Compare all methods with one call of the dense rollout."""
        if not self.active or event.stream != "self":
            return
        dense = attention_weights(event.q, event.k)
        for name, state in self.states.items():
            replayed = state.replay(event)
            weights = attention_weights(
                replayed.q, replayed.k, log_count=replayed.log_count, plan=replayed.plan
            )
            past = self._lineages[name].assignment(event.layer, state.cache.view(event.layer))
            current = torch.arange(
                replayed.k.shape[2] - event.q.shape[2], replayed.k.shape[2], device=past.device
            )
            members = torch.cat([past, current.expand(*past.shape[:2], -1)], 2)
            recall = attention_recall(dense, spread_over_members(weights, members))
            error = relative_output_error(replayed.out, event.out)
            self._found[name].append((recall.mean(dim=(1, 2)), error.mean(dim=1)))

    def scores(self, name: str) -> dict[str, list[float]]:
        """`recall` and `output_error` of a method, one number a video; forgets them."""
        recalls, errors = zip(*self._found[name], strict=True)
        self._found[name] = []
        means = {"recall": torch.stack(recalls), "output_error": torch.stack(errors)}
        return {metric: values.mean(dim=0).tolist() for metric, values in means.items()}
