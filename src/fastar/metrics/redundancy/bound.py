r"""How far merges can move the output of attention, from key distances alone, beside how far they did.

A merged cache puts a slot's key k' in place of the key k_i of each of its m members, the mean value in place of their
values, and adds log m to its logit. The slot then weighs as much as m tokens with key k', and times the mean value
that is the sum over those tokens with their own values: the output is sum_i b_i v_i, where b is the softmax of logits
that differ from dense ones by at most (design: "Bound"; Cauchy-Schwarz)

    e_i = |q| |k_i - k'| / sqrt(D) + |log_count - log m|.

The second term is 0 unless the log-count is left out; e_i is infinite for a token that was dropped. Among all logits
within these intervals, the weight of token i becomes largest when its own logit rises and all others fall:

    b_i <= a_i exp(e_i) / (a_i exp(e_i) + sum_{j != i} a_j exp(-e_j)),

and smallest the other way round, so that |b_i - a_i| <= g_i. Both weights sum to 1, so a constant c may be taken from
all values, and with c = o, the dense output,

    |o' - o| <= sum_i g_i |v_i - o|                                        (bound by mass)

to which comes what slots' values differ from the mean of their members' (merges of any other value, quantisation).
With e = max_i e_i, no distribution moves by more than tanh(e / 2) in total variation (attained where a set of mass
1 / (1 + exp(e)) rises by e and the rest falls by e), and o' lies among the values, so with R = max_i |v_i - o|

    |o' - o| <= min(2 tanh(e / 2), 1) R,                                   (worst case)

which needs no attention weights, but lets the worst merge speak for all. The bound is the smaller one of the two; two
tokens attain it. Beside it stands an estimate, no bound, that says whether Cauchy-Schwarz or the rest makes it loose:
the same to first order, with the true change of each logit,

    sum_i a_i |q . (k_i - k')| / sqrt(D) |v_i - o|.                        (first order)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.attention.events import AttendEvent
from fastar.attention.state import AttentionState
from fastar.cache.lineage import DROPPED, Lineage
from fastar.engines.reference import attention_weights
from fastar.metrics.attention import members_of
from fastar.metrics.recall import member_counts, relative_output_error
from fastar.metrics.redundancy.means import Means, Tables


@dataclass(frozen=True)
class Displacement:
    """What a cache has done to each original token.

    Attributes:
        change: [B, H, L, D], k' - k_i of roped keys; 0 for a dropped token.
        dropped: bool [B, H, L].
        offset: [B, H, L], |log_count - log m| of its slot.
        value: [B, H, L], distance of its slot's value to the mean of the members'.
    """

    change: Tensor
    dropped: Tensor
    offset: Tensor
    value: Tensor


def displacement(k: Tensor, v: Tensor, event: AttendEvent, assignment: Tensor) -> Displacement:
    """Of tokens with dense keys and values [B, H, L, D] in the slots of a method's call.

    `assignment` is int64 [B, H, L], the slot of each token or `DROPPED`.
    """
    slots = event.k.shape[2]
    index = assignment.clamp(min=0)
    counts = member_counts(assignment, slots)
    dropped = assignment == DROPPED

    def of_slots(x: Tensor) -> Tensor:
        return x.float().gather(2, index[..., None].expand(*index.shape, x.shape[-1]))

    sums = torch.zeros_like(event.v, dtype=torch.float32)
    kept = v.float().masked_fill(dropped[..., None], 0)
    sums.scatter_add_(2, index[..., None].expand_as(v), kept)
    apart = (event.v.float() - sums / counts.clamp(min=1)[..., None]).norm(dim=-1)
    log_count = torch.zeros_like(counts, dtype=torch.float32)
    if event.log_count is not None:
        log_count = event.log_count
    offset = (log_count - counts.clamp(min=1).float().log()).abs().expand(counts.shape)
    return Displacement(
        (of_slots(event.k) - k.float()).masked_fill(dropped[..., None], 0),
        dropped,
        offset.gather(2, index).masked_fill(dropped, 0),
        apart.gather(2, index).masked_fill(dropped, 0),
    )


def output_bounds(
    q: Tensor, weights: Tensor, v: Tensor, moved: Displacement
) -> tuple[Tensor, Tensor, Tensor]:
    """Of |o' - o| of each query: the bound, the worst case alone, and the first-order estimate, [B, H, Q] each.

    Args:
        q: [B, H, Q, D]. weights: dense softmax weights [B, H, Q, L] over tokens with values v [B, H, L, D].
        moved: of these tokens.
    """
    q, v, value = q.float() * q.shape[-1] ** -0.5, v.float(), moved.value[..., None, :]
    distance = moved.change.norm(dim=-1).masked_fill(moved.dropped, torch.inf)
    change = (
        q.norm(dim=-1, keepdim=True) * distance[..., None, :] + moved.offset[..., None, :]
    )  # e_i, [B, H, Q, L]
    apart = torch.cdist(weights @ v, v)
    rise, fall = _extremes(weights, change)
    by_mass = (torch.maximum(rise - weights, weights - fall) * apart + rise * value).sum(-1)
    worst = (2 * (change.amax(-1) / 2).tanh()).clamp(max=1) * apart.amax(-1) + value.amax(-1)
    logits = (q @ moved.change.mT).abs() + moved.offset[..., None, :]
    logits = logits.masked_fill(moved.dropped[..., None, :], 1)  # dropped: the whole weight goes
    estimate = (weights * (logits * apart + value)).sum(-1)
    return torch.minimum(by_mass, worst), worst, estimate


def _extremes(weights: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest weight that each token can get if logits move by at most `change`; 0 if it is dropped."""
    dropped = change == torch.inf
    mass = weights.clamp(min=1e-37).log()  # in logarithms: a wide interval would overflow
    up, down = ((mass + sign * change).masked_fill(dropped, -torch.inf) for sign in (1, -1))
    return torch.sigmoid(up - _without_each(down)), torch.sigmoid(down - _without_each(up))


def _without_each(logs: Tensor) -> Tensor:
    """log sum_{j != i} exp(logs_j) for each i, [..., L]."""
    top = logs.amax(-1, keepdim=True)
    terms = (logs - top).double().exp()
    rest = (terms.sum(-1, keepdim=True) - terms).clamp(min=1e-300)
    return (rest.log() + top).to(logs.dtype)


class ErrorBounds(Tables):
    """Measured error of attention's output, its bounds and the estimate, [layers, heads] each.

    Relative as `relative_output_error` is: norms over the queries and channels of a head.

    Args:
        num_layers, num_heads: of the backbone.
    """

    NAMES = ("output_error", "error_bound", "error_bound_worst", "error_first_order")

    def __init__(self, num_layers: int, num_heads: int) -> None:
        super().__init__({name: Means(num_layers, num_heads) for name in self.NAMES})

    def update(self, layer: int, out: Tensor, dense_out: Tensor, bounds: tuple[Tensor, ...]) -> None:
        """Add one call: outputs [B, H, Q, D] and what `output_bounds` says of these queries."""
        norm = dense_out.float().norm(dim=(-2, -1))
        found = [relative_output_error(out, dense_out), *(bound.norm(dim=-1) / norm for bound in bounds)]
        for name, values in zip(self.NAMES, found, strict=True):
            self._add(name, layer, values.sum(0), len(values))


class BoundProbe:
    """Bounds and measured error of methods at the calls of a dense rollout whose commits fill their caches.

    Create it before the first commit; it looks when it is called.

    Args:
        states: of the methods, by name (protocol A).
        num_layers, num_heads: of the backbone.
        every: queries looked at, one in so many.
    """

    def __init__(
        self, states: Mapping[str, AttentionState], num_layers: int, num_heads: int, *, every: int = 1
    ) -> None:
        self.every = every
        self.lineages = {name: Lineage() for name in states}
        for name, state in states.items():
            state.cache.follow(self.lineages[name])
        self.found = {name: ErrorBounds(num_layers, num_heads) for name in states}
        self.states = dict(states)

    def look(self, name: str, dense: AttendEvent, replayed: AttendEvent) -> None:
        """Take in one self-attention call and what the method `name` made of it (`AttentionState.replay`).

        Raises:
            ValueError: the method skips pairs, which merges' bounds say nothing about.
        """
        if replayed.plan is not None:
            raise ValueError(
                f"the bound is of merges alone and {name} skips pairs: measure it with dense self-attention"
            )
        part = slice(None, None, self.every)
        q, out = dense.q[:, :, part], dense.out[:, :, part]
        moved = displacement(
            dense.k, dense.v, replayed, members_of(self.lineages[name], self.states[name], replayed)
        )
        weights = attention_weights(q, dense.k)
        bounds = output_bounds(q, weights, dense.v, moved)
        self.found[name].update(dense.layer, replayed.out[:, :, part], out, bounds)

    def compute(self, name: str) -> dict[str, Tensor]:
        """Means over calls, [layers, heads], by `ErrorBounds.NAMES`; nothing of a method that is not looked at."""
        return self.found[name].compute() if name in self.found else {}
