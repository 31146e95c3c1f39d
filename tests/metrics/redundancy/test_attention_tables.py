"""How attention is spread: over entries, lags and the prompt, in patterns made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastar.metrics.redundancy import AttentionByLag, PromptMass, TopEntries
from fastar.metrics.redundancy.pca import principal_components
from fastar.metrics.redundancy.top_entries import entropy
from fastar.sparsity.base import PromptKeys

QUERY, BLOCKS = 0, 1


def top(
    weights: torch.Tensor, values: torch.Tensor | None = None, live: torch.Tensor | None = None
) -> TopEntries:
    """Of one head: weights [Q, S] at densities .1, .25, .5 and 1, blocks of two queries and two keys."""
    found = TopEntries(1, 1, densities=(0.1, 0.25, 0.5, 1.0), block_q=2, block_k=2)
    slots = weights.shape[1]
    values = torch.ones(slots, 3) if values is None else values
    live = torch.ones(slots, dtype=torch.bool) if live is None else live
    found.update(0, weights[None, None], values[None, None], live[None, None])
    return found


def test_of_uniform_attention_any_share_of_entries_holds_that_share() -> None:
    found = top(torch.full((4, 20), 1 / 20)).compute()["recall"][:, 0, 0]
    assert found[QUERY].tolist() == pytest.approx([0.1, 0.25, 0.5, 1])
    assert found[BLOCKS].tolist() == pytest.approx([0.1, 0.2, 0.5, 1])  # of ten blocks, rounded down


def test_one_entry_for_each_query_holds_all_but_blocks_need_more() -> None:
    weights = torch.zeros(2, 20)
    weights[0, 3] = weights[1, 12] = 1
    found = top(weights).compute()["recall"][:, 0, 0]
    assert found[QUERY].tolist() == pytest.approx([1, 1, 1, 1])
    assert found[BLOCKS].tolist() == pytest.approx([0.5, 1, 1, 1])


def test_the_error_is_that_of_the_entries_kept() -> None:
    weights, values = torch.tensor([[0.6, 0.4] + 18 * [0.0]]), torch.randn(20, 3)
    found = TopEntries(1, 1, densities=(0.05, 0.1))
    found.update(0, weights[None, None], values[None, None], torch.ones(1, 1, 20, dtype=torch.bool))
    dense = 0.6 * values[0] + 0.4 * values[1]
    expected = (values[0] - dense).norm() / dense.norm()
    assert found.compute()["error"][QUERY, 0, 0].tolist() == pytest.approx([expected.item(), 0], abs=1e-6)


def test_densities_are_of_live_slots() -> None:
    weights = torch.cat([torch.full((2, 8), 1 / 8), torch.zeros(2, 12)], 1)
    live = torch.arange(20) < 8
    assert top(weights, live=live).compute()["recall"][QUERY, 0, 0, 2].item() == pytest.approx(0.5)
    assert top(weights).compute()["recall"][QUERY, 0, 0, 2].item() == pytest.approx(1)


def test_parts_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        top(torch.full((3, 8), 1 / 8))


def test_entropy_counts_tokens() -> None:
    assert entropy(torch.full((7,), 1 / 7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([1.0, 0, 0])).item() == 0
    merged = entropy(torch.tensor([[0.25, 0.75]]), torch.tensor([0, math.log(3)]))
    assert merged.item() == pytest.approx(math.log(4))


def test_attention_falls_into_its_lag() -> None:
    frames = torch.tensor([0, 0, 1, 1, 4, 4, 5, 5])[None, None]
    lags = AttentionByLag(2, edges=(0, 1, 2, 4))
    weights = torch.zeros(1, 1, 2, 8)
    weights[..., 4] = 1  # queries of frame 5 look at frame 4
    lags.update(1, weights, torch.tensor([5, 5]), frames, torch.ones(1, 1, 8, dtype=torch.bool))
    attention, keys = lags.compute()
    assert attention[1].tolist() == [0, 1, 0, 0] and keys[1].tolist() == [0.25, 0.25, 0, 0.5]
    assert attention[0].isnan().all()


@pytest.mark.parametrize("merged", [False, True])
def test_padding_is_told_apart_from_the_prompt(merged: bool) -> None:
    real = torch.tensor([1, 1, 1, 0] if merged else [1, 1, 1, 0, 0, 0]).bool()[None, None]
    log_count = torch.tensor([0, 0, 0, math.log(3)])[None, None] if merged else None
    weights = torch.tensor([1 / 6, 1 / 6, 1 / 6, 0.5] if merged else 6 * [1 / 6])[None, None, None]
    prompt = PromptMass(1)
    prompt.update(0, weights, PromptKeys(torch.zeros(*real.shape, 4), real, log_count, None))
    found = {name: table.item() for name, table in prompt.compute().items()}
    assert found == pytest.approx(
        {
            "padding_mass": 0.5,
            "padding_share": 0.5,
            "entropy": math.log(3),
            "effective": 3,
            "effective_share": 1,
            "effective_padded": 6,
        }
    )


def test_attention_to_one_word_is_one_effective_token() -> None:
    real = torch.tensor([1, 1, 1, 0]).bool()[None, None]
    weights = torch.tensor([0.1, 0, 0, 0.9])[None, None, None]
    prompt = PromptMass(1)
    prompt.update(0, weights, PromptKeys(torch.zeros(1, 1, 4, 4), real))
    assert prompt.compute()["effective"].item() == pytest.approx(1)
    assert prompt.compute()["padding_mass"].item() == pytest.approx(0.9)


def test_principal_components_are_ordered_and_scaled() -> None:
    line = torch.outer(torch.linspace(-1, 3, 9), torch.tensor([3.0, 0, 4]))
    along, shares = principal_components(line + 1, 2)
    assert along.abs().amax(0)[0].item() == 1 == along[:, 0].max().item()
    assert shares.tolist() == pytest.approx([1, 0], abs=1e-6)
