"""TempCache by the letter of the paper: against a token-by-token one, padding, growth, representatives."""

import math

import pytest
import torch
from torch import Tensor

from fastar import cache
from fastar.cache import Staged

from .worlds import BATCH, DIM, FLOAT, HEADS, ROPE, TOKENS, bound, commit, fill, scene_chunks, staged


def paper_by_hand(
    chunks: list[Staged], threshold: float, b: int, h: int
) -> dict[tuple[int, int, int], tuple[Tensor, Tensor, int]]:
    """(position of the newest member) -> (raw key, sum of values, count), token by token."""
    slots: list[list] = []
    for chunk in chunks:
        for frame in range(chunk.k.shape[2] // TOKENS):
            tokens = range(frame * TOKENS, (frame + 1) * TOKENS)
            previous = list(slots)
            joined: dict[int, list[int]] = {}
            for t in tokens:
                if previous:
                    best = max(
                        range(len(previous)), key=lambda i: float(previous[i][0] @ chunk.q_raw[b, h, t])
                    )
                    key = chunk.k_raw[b, h, t]
                    if torch.cosine_similarity(previous[best][0], key, dim=0) >= threshold:
                        joined.setdefault(best, []).append(t)
            merged = {t: None for ts in joined.values() for t in ts}
            slots = [s for i, s in enumerate(previous) if i not in joined]
            for t in tokens:
                if t not in merged:
                    position = tuple(chunk.positions[t].tolist())
                    slots.append([chunk.k_raw[b, h, t], chunk.v[b, h, t].clone(), 1, position])
            for i, ts in joined.items():
                value = previous[i][1] + sum(chunk.v[b, h, t] for t in ts)
                last = ts[-1]
                slots.append(
                    [
                        chunk.k_raw[b, h, last],
                        value,
                        previous[i][2] + len(ts),
                        tuple(chunk.positions[last].tolist()),
                    ]
                )
    return {s[3]: (s[0], s[1], s[2]) for s in slots}


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_paper_form_equals_a_token_by_token_one(threshold: float) -> None:
    chunks = scene_chunks(6, places=2, noise=0.3)
    policy = bound(cache.TempCachePaper(threshold=threshold, **FLOAT), layers=1)
    for chunk in chunks:
        commit(policy, chunk)
    view = policy.view(0)
    raw = ROPE.unrotate(view.k, view.positions)
    used = 0
    for b in range(BATCH):
        for h in range(HEADS):
            expected = paper_by_hand(chunks, threshold, b, h)
            live = (view.log_count[b, h] > -math.inf).nonzero().flatten().tolist()
            used += len(live)
            assert len(live) == len(expected)
            for slot in live:
                key, value, count = expected[tuple(view.positions[b, h, slot].tolist())]
                torch.testing.assert_close(raw[b, h, slot], key, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(view.v[b, h, slot], value / count, atol=1e-4, rtol=1e-4)
                assert view.log_count[b, h, slot].exp().round() == count
    assert policy.slots_used() == math.ceil(used / (BATCH * HEADS))
    assert used < BATCH * HEADS * 12 * TOKENS or threshold == 0.9


def test_the_paper_form_pads_heads_of_different_length_and_counts_the_padding() -> None:
    policy = bound(cache.TempCachePaper(threshold=0.6, **FLOAT), layers=1)
    chunks = scene_chunks(8, places=3, noise=0.4)
    for chunk in chunks:
        commit(policy, chunk)
    log_count = policy.view(0).log_count
    lengths = (log_count > -math.inf).sum(-1)
    assert lengths.min() < lengths.max() == log_count.shape[2]
    assert policy.bytes_used() == policy._buffers[0].narrow(0, policy.filled).nbytes
    total = log_count.double().exp().sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 16 * TOKENS))


def test_the_paper_form_grows_where_nothing_repeats_and_not_where_everything_does() -> None:
    still, noise = bound(cache.TempCachePaper(), layers=1), bound(cache.TempCachePaper())
    for chunk in scene_chunks(10, places=1, noise=0.0):
        commit(still, chunk)
    fill(noise, 10)
    assert still.slots_used() <= TOKENS
    assert noise.slots_used() > 15 * TOKENS and noise.capacity_bytes() is None


def test_one_to_one_leaves_rivals_apart() -> None:
    chunk = scene_chunks(1, places=1, noise=0.0)[0]
    same = chunk.k_raw[:, :, :1].expand(-1, -1, 2 * TOKENS, -1).clone()
    same[:, :, 1:TOKENS] = (
        torch.randn(BATCH, HEADS, TOKENS - 1, DIM) * 0.1 - same[:, :, :1]
    )  # only token 0 corresponds
    group, single = (bound(cache.TempCachePaper(one_to_one=o, **FLOAT), layers=1) for o in (False, True))
    for policy in (group, single):
        commit(policy, staged(same, same, chunk.v, 0))
    assert group.view(0).log_count.exp().amax().round() == TOKENS + 1
    assert single.view(0).log_count.exp().amax().round() == 2
    assert single.view(0).positions[0, 0, :, 0].max() == 1


def test_the_newest_value_instead_of_the_mean_changes_nothing_else() -> None:
    mean, last = (
        bound(cache.TempCachePaper(value=v, threshold=0.5, **FLOAT), layers=1) for v in ("mean", "last")
    )
    chunks = scene_chunks(4, places=1, noise=0.1)
    for policy in (mean, last):
        for chunk in chunks:
            commit(policy, chunk)
    views = mean.view(0), last.view(0)
    for name in ("k", "positions", "log_count"):
        assert torch.equal(*(getattr(view, name) for view in views))
    every = torch.cat([chunk.v for chunk in chunks], 2)
    known = [(view.v[:, :, :, None] == every[:, :, None]).all(-1).any(-1) for view in views]
    merged = views[0].log_count > 0
    assert merged.any() and known[1][merged].all() and not known[0][merged].any()


@pytest.mark.parametrize("key", ["mean", "medoid"])
@pytest.mark.parametrize("space", ["raw", "roped"])
def test_paper_form_representatives(key: str, space: str) -> None:
    chunks = scene_chunks(4, places=1, noise=0.1)
    policy = bound(
        cache.TempCachePaper(key=key, match_space=space, threshold=0.5, sink_frames=1, **FLOAT), layers=1
    )
    for chunk in chunks:
        commit(policy, chunk)
    every = torch.cat([c.k for c in chunks], 2)
    view = policy.view(0)
    assert torch.equal(view.k[:, :, :TOKENS], every[:, :, :TOKENS])  # the sink
    merged = view.log_count > 0
    assert merged.any()
    known = (view.k[:, :, :, None] == every[:, :, None]).all(-1).any(-1)
    assert known[merged].all() if key == "medoid" else not known[merged].all()
