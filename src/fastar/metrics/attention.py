"""Methods held against dense attention call by call: the same queries and current chunk, each with its own past."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.attention.state import AttentionState
from fastar.cache.lineage import Lineage
from fastar.engines.reference import attention_weights
from fastar.metrics.recall import attention_recall, relative_output_error, spread_over_members

LARGEST = 2**30
"""Weights in one matrix of float32, of which a look holds about six: more heads than that allows are taken in parts."""


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
        replays = {name: state.replay(event) for name, state in self.states.items()}
        members = {
            name: members_of(self._lineages[name], self.states[name], replayed)
            for name, replayed in replays.items()
        }
        recalls: dict[str, list[Tensor]] = {name: [] for name in replays}
        for heads in _parts(event):
            dense = attention_weights(event.q[:, heads], event.k[:, heads])
            for name, replayed in replays.items():
                weights = attention_weights(
                    replayed.q[:, heads],
                    replayed.k[:, heads],
                    log_count=None if replayed.log_count is None else replayed.log_count[:, heads],
                    plan=None if replayed.plan is None else replayed.plan.of_heads(heads),
                )
                kept = attention_recall(dense, spread_over_members(weights, members[name][:, heads]))
                recalls[name].append(kept.mean(dim=2))
        for name, replayed in replays.items():
            error = relative_output_error(replayed.out, event.out)
            self._found[name].append((torch.cat(recalls[name], 1).mean(dim=1), error.mean(dim=1)))

    def scores(self, name: str) -> dict[str, list[float]]:
        """`recall` and `output_error` of a method, one number a video; forgets them."""
        recalls, errors = zip(*self._found[name], strict=True)
        self._found[name] = []
        means = {"recall": torch.stack(recalls), "output_error": torch.stack(errors)}
        return {metric: values.mean(dim=0).tolist() for metric, values in means.items()}


def members_of(lineage: Lineage, state: AttentionState, replayed: AttendEvent) -> Tensor:
    """The slot of every original token, and of the pass's, which are their own: int64 [B, H, tokens].

    `replayed` is a call in `state`, whose cache `lineage` follows.
    """
    past = lineage.assignment(replayed.layer, state.cache.view(replayed.layer))
    keys = replayed.k.shape[2]
    current = torch.arange(keys - replayed.current_keys, keys, device=past.device)
    return torch.cat([past, current.expand(*past.shape[:2], -1)], 2)


def _parts(event: AttendEvent) -> Iterator[slice]:
    """Heads that are looked at together."""
    batch, heads, queries, _ = event.q.shape
    step = max(1, LARGEST // (batch * queries * event.k.shape[2]))
    for start in range(0, heads, step):
        yield slice(start, start + step)
