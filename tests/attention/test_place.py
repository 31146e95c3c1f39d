"""The kernel that turns and places a pass's queries and keys, against its definition."""

import os

import pytest
import torch
from torch import Tensor

from fastar.attention.place import Placement
from fastar.attention.rope import RotaryEmbedding, apply_rotation, grid_positions
from fastar.engines.augmented import augment_keys, augment_queries

TOKENS, CACHED = 21, 13


def projections(head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k and v [B, H, L, D], views of the one product that made them."""
    memory = torch.randn(2, TOKENS, 3, 3, head_dim).to(device, dtype)
    return [part.transpose(1, 2) for part in memory.unbind(2)]


def outputs(q: Tensor, q_width: int, k_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, working keys and working values, poisoned."""
    batch, heads, _, width = q.shape
    slots = TOKENS + CACHED
    sizes = ((TOKENS, q_width), (slots, k_width), (slots, width))
    return tuple(q.new_full((batch, heads, *size), torch.nan) for size in sizes)  # type: ignore[return-value]


def tables(head_dim: int, device: torch.device, double: bool = False) -> tuple[Tensor, Tensor]:
    rope = RotaryEmbedding(head_dim, double=double)
    return rope.tables(grid_positions(5, 3, (1, TOKENS // 3), device))


@pytest.mark.parametrize("ordered", [False, True], ids=["", "in order"])
@pytest.mark.parametrize(("head_dim", "q_width", "k_width", "dtype", "double"), [
    (12, 12, 12, torch.float32, False), (12, 16, 16, torch.bfloat16, False), (6, 8, 14, torch.float32, True),
    (128, 144, 144, torch.bfloat16, False), (128, 128, 192, torch.float16, False),
])  # fmt: skip
def test_the_kernel_places_what_the_definition_does(
    head_dim: int,
    q_width: int,
    k_width: int,
    dtype: torch.dtype,
    double: bool,
    ordered: bool,
    device: torch.device,
) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is on only where there is no GPU (tests/conftest.py)")
    pytest.importorskip("triton")
    q, k, v = projections(head_dim, dtype, device)
    turns = tables(head_dim, device, double)
    order = torch.rand(q.shape[:3], device=device).argsort(-1) if ordered else None
    found, expected = outputs(q, q_width, k_width), outputs(q, q_width, k_width)
    for method, (q_out, keys, values) in ((Placement.fused, found), (Placement.plainly, expected)):
        method(Placement(q, k, v, turns, q_out, keys[:, :, CACHED:], values[:, :, CACHED:], order))
    for ours, definition in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, definition, equal_nan=True)  # what is not the pass's stays as it was


def test_the_definition_is_rotation_and_the_augmented_head(device: torch.device) -> None:
    q, k, v = projections(12, torch.float32, device)
    turns = tables(12, device)
    q_out, keys, values = outputs(q, 16, 16)
    Placement(q, k, v, turns, q_out, keys[:, :, CACHED:], values[:, :, CACHED:]).run()
    torch.testing.assert_close(q_out, augment_queries(apply_rotation(q, turns), 16))
    no_count = torch.zeros(k.shape[:3], device=device)
    torch.testing.assert_close(keys[:, :, CACHED:], augment_keys(apply_rotation(k, turns), no_count, 16))
    assert torch.equal(values[:, :, CACHED:], v) and values[:, :, :CACHED].isnan().all()


def test_queries_are_put_in_an_order(device: torch.device) -> None:
    q, k, v = projections(12, torch.float32, device)
    turns, order = tables(12, device), torch.rand(q.shape[:3], device=device).argsort(-1)
    (q_out, keys, values), (plain, *_) = outputs(q, 16, 16), outputs(q, 16, 16)
    for out, given in ((q_out, order), (plain, None)):
        Placement(q, k, v, turns, out, keys[:, :, CACHED:], values[:, :, CACHED:], given).run()
    torch.testing.assert_close(q_out, plain.gather(2, order[..., None].expand_as(plain)))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = projections(12, torch.float32, torch.device("cpu"))
    turns = tables(12, q.device)
    q_out, keys, values = (torch.empty(*q.shape[:3], width) for width in (16, 16, 12))
    with pytest.raises(ValueError, match="of one shape"):
        Placement(q, k[:, :, 1:], v, turns, q_out, keys, values)
    with pytest.raises(ValueError, match="tables"):
        Placement(q, k, v, (turns[0][1:], turns[1]), q_out, keys, values)
    with pytest.raises(ValueError, match="12 or at least 14 wide"):
        Placement(q, k, v, turns, q_out, keys[..., :13], values)
    with pytest.raises(ValueError, match="q_order must be"):
        Placement(q, k, v, turns, q_out, keys, values, torch.zeros(q.shape[:2], dtype=torch.long))
    with pytest.raises(ValueError, match="last stride"):
        Placement(q, k, v, turns, q_out, torch.empty(2, 3, 16, TOKENS).transpose(2, 3), values)
