"""Rotary embedding against its definition, and the properties that caches rely on."""

import cmath
import math

import pytest
import torch

from fastar.attention.rope import RotaryEmbedding, apply_rotation, grid_positions


def by_definition(x: list[float], position: tuple[int, int, int], theta: float = 10000.0) -> list[float]:
    """One head, in plain Python: pair i of an axis of n numbers turns by p * theta^(-2i/n)."""
    spatial = 2 * (len(x) // 6)
    turned: list[float] = []
    for size, p in zip((len(x) - 2 * spatial, spatial, spatial), position, strict=True):
        for i in range(size // 2):
            start = len(turned)
            z = complex(x[start], x[start + 1]) * cmath.exp(1j * p * theta ** (-2 * i / size))
            turned += [z.real, z.imag]
    return turned


@pytest.mark.parametrize("head_dim", [6, 32, 64, 128])
@pytest.mark.parametrize("position", [(0, 0, 0), (3, 5, 7), (100_000, 29, 51)])
def test_rotation_is_the_definition(head_dim: int, position: tuple[int, int, int]) -> None:
    x = torch.randn(head_dim, generator=torch.Generator().manual_seed(0))
    turned = RotaryEmbedding(head_dim).rotate(x[None], torch.tensor([position]))[0]
    torch.testing.assert_close(turned, torch.tensor(by_definition(x.tolist(), position)), rtol=0, atol=2e-6)


def test_wan_splits_128_dims_into_44_42_42() -> None:
    assert RotaryEmbedding(128).axis_dims == (44, 42, 42)


def test_grid_positions_are_frame_row_column_from_an_absolute_frame() -> None:
    expected = [(f, r, c) for f in (7, 8) for r in range(2) for c in range(3)]
    assert grid_positions(7, 2, (2, 3)).tolist() == [list(p) for p in expected]


def test_unrotate_inverts_rotate_for_grids_and_for_per_head_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    rope = RotaryEmbedding(64)
    x = torch.randn(2, 3, 20, 64, generator=generator)
    slots = torch.randint(0, 5000, (2, 3, 20, 3), generator=generator)
    for positions in (grid_positions(4, 1, (4, 5)), slots):
        turned = rope.rotate(x, positions)
        assert (turned - x).abs().max() > 0.1
        torch.testing.assert_close(rope.unrotate(turned, positions), x, rtol=0, atol=2e-6)


def test_per_head_positions_equal_the_same_positions_shared() -> None:
    rope = RotaryEmbedding(32)
    x = torch.randn(2, 3, 6, 32, generator=torch.Generator().manual_seed(0))
    grid = grid_positions(9, 1, (2, 3))
    assert torch.equal(rope.rotate(x, grid), rope.rotate(x, grid.expand(2, 3, 6, 3).contiguous()))


def test_a_score_depends_on_relative_position_only() -> None:
    generator = torch.Generator().manual_seed(0)
    rope = RotaryEmbedding(64)
    q, k = torch.randn(2, 1, 64, generator=generator)
    query, key, shift = torch.tensor([[12, 3, 4]]), torch.tensor([[2, 5, 1]]), torch.tensor([[1000, 7, 9]])

    def score(query: torch.Tensor, key: torch.Tensor) -> float:
        return (rope.rotate(q, query) * rope.rotate(k, key)).sum().item()

    assert score(query + shift, key + shift) == pytest.approx(score(query, key), abs=1e-4)
    assert score(query + shift, key) != pytest.approx(score(query, key), abs=1e-1)


def test_a_grid_changed_between_calls_is_not_served_from_memory() -> None:
    rope = RotaryEmbedding(32)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    first = rope.rotate(x, grid_positions(0, 1, (2, 3)))
    later = rope.rotate(x, grid_positions(1, 1, (2, 3)))
    assert not torch.allclose(first, later)
    assert torch.equal(later, RotaryEmbedding(32).rotate(x, grid_positions(1, 1, (2, 3))))


def test_dtype_is_kept_and_bfloat16_is_rotated_in_float32() -> None:
    rope = RotaryEmbedding(64)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = grid_positions(500, 1, (2, 5))
    turned = rope.rotate(x, positions)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rope.rotate(x.float(), positions).bfloat16())


def test_double_precision_agrees_with_complex_arithmetic() -> None:
    x = torch.randn(1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = RotaryEmbedding(128, double=True).rotate(x, torch.tensor([[937, 29, 51]]))[0]
    expected = torch.tensor(by_definition(x[0].tolist(), (937, 29, 51)), dtype=torch.float64)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_compiled_rotation_and_its_gradient_equal_eager() -> None:
    rope = RotaryEmbedding(32)
    positions = grid_positions(3, 2, (2, 3))
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(rope.rotate, backend="aot_eager", fullgraph=True)
    results = []
    for rotate in (rope.rotate, compiled):
        turned = rotate(x, positions)
        (gradient,) = torch.autograd.grad((turned * weight).sum(), x)
        results.append((turned.detach(), gradient))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-6)


def test_tables_are_angles_of_the_frame_axis_first() -> None:
    cos, sin = RotaryEmbedding(32).tables(torch.tensor([[2, 0, 0]]))
    assert cos.shape == sin.shape == (1, 16)
    assert math.atan2(sin[0, 0], cos[0, 0]) == pytest.approx(2.0, abs=1e-6)
    assert torch.equal(
        cos[0, 6:], torch.ones(10)
    )  # 12 of 32 dims turn with the frame; rows and columns are at 0
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    rotated = RotaryEmbedding(32).rotate(x, torch.tensor([[2, 0, 0]]))
    assert torch.equal(apply_rotation(x, (cos, sin)), rotated)


@pytest.mark.parametrize("head_dim", [4, 33])
def test_a_head_that_cannot_be_split_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim must be even and at least 6"):
        RotaryEmbedding(head_dim)


def test_positions_without_three_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="must end in 3"):
        RotaryEmbedding(32).rotate(torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.long))
