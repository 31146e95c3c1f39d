"""What self-attention attends to: the past and its own chunk, what selectors see of these, and their plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastar.attention.context import PassKind
from fastar.attention.rope import grid_positions
from fastar.cache import DenseCache, EmptyCache
from fastar.engines.plan import BlockPlan
from fastar.sparsity import Selector, SelectRequest
from tests.attention.passes import POLICIES, commit, denoise, qkv
from tests.small import CHUNK, DIM, GRID, TOKENS, small_state


def test_a_chunk_reads_everything_before_it_and_itself_under_rope() -> None:
    """Against attention over the whole sequence, written out."""
    state = small_state(DenseCache(storage="float32"))
    outs = [commit(state, chunk)[1] for chunk in range(3)]
    q, k, v = torch.cat([qkv(100 * chunk + 1) for chunk in range(3)], dim=3)
    positions = grid_positions(0, 3 * CHUNK, GRID)
    q, k = (state.rope.rotate(x, positions).double() for x in (q, k))
    chunks = positions[:, 0] // CHUNK
    logits = (q @ k.mT / DIM**0.5).masked_fill(chunks[:, None] < chunks, -torch.inf)
    torch.testing.assert_close(
        torch.cat(outs, dim=2).double(), logits.softmax(-1) @ v.double(), rtol=0, atol=1e-5
    )


class Spy(Selector):
    """Remembers its requests; its plan is every pair, or that of a function."""

    def __init__(self, match_space: str = "roped") -> None:
        super().__init__(warmup_share=0.0, min_dense_steps=0)
        self.match_space = match_space  # type: ignore[assignment]
        self.requests: list[SelectRequest] = []

    def select(self, request: SelectRequest) -> BlockPlan | None:
        self.requests.append(replace(request, k=request.k.clone()))
        return None


@pytest.mark.parametrize("policy", ["dense", "tempcache"])
@pytest.mark.parametrize("space", ["roped", "raw"])
def test_a_selector_sees_cached_keys_then_the_current_chunk(policy: str, space: str) -> None:
    spy = Spy(space)
    state = small_state(POLICIES[policy](), spy)
    for chunk in range(6):
        commit(state, chunk)
    assert not spy.requests, "commit passes are dense"
    denoise(state, 6)
    view, request = state.cache.view(1), spy.requests[1]
    assert (
        request.layer == 1
        and request.context.first_frame == 6 * CHUNK
        and request.context.kind == PassKind.DENOISE
    )
    assert request.num_current == CHUNK * TOKENS
    q, k, _ = qkv(7003 + 1)
    positions = grid_positions(6 * CHUNK, CHUNK, GRID)
    assert torch.equal(request.q, state.rope.rotate(q, positions))
    assert torch.equal(request.k, torch.cat([view.k, state.rope.rotate(k, positions)], dim=2))
    if policy == "dense":
        assert request.log_count is None
    else:
        assert (
            torch.equal(request.log_count[..., :-12], view.log_count)
            and (request.log_count[..., -12:] == 0).all()
        )
        assert (request.log_count > 0).any()
    if space == "roped":
        assert request.k_raw is None
    else:
        assert torch.equal(request.q_raw, q) and torch.equal(request.k_raw[:, :, -12:], k)
        past = state.rope.unrotate(view.k, view.positions)
        torch.testing.assert_close(request.k_raw[:, :, :-12], past, rtol=0, atol=1e-6)


class OwnChunkOnly(Spy):
    """Executes the blocks of the current chunk and no other."""

    def select(self, request: SelectRequest) -> BlockPlan:
        lead, queries, keys = request.q.shape[:2], request.q.shape[2], request.k.shape[2]
        order = [torch.arange(n).expand(*lead, n) for n in (queries, keys)]
        mask = torch.zeros(*lead, 1, keys // TOKENS, dtype=torch.bool)
        mask[..., -CHUNK:] = True
        return BlockPlan(*order, block_q=queries, block_k=TOKENS, block_mask=mask)


def test_a_plan_is_executed_in_sparse_steps_alone() -> None:
    state, empty = small_state(DenseCache(), OwnChunkOnly()), small_state(EmptyCache())
    for chunk in range(3):
        commit(state, chunk), commit(empty, chunk)
    for a, b in zip(denoise(state, 3), denoise(empty, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    state.self_selector.min_dense_steps = 4
    assert (denoise(state, 3)[0] - denoise(empty, 3)[0]).abs().max() > 1e-2
