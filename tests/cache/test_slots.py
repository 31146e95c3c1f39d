"""Number formats, positions and the container."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar.cache.slots import SlotFormat, Slots, pack_positions, take, unpack_positions


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([8, 4]), group=st.sampled_from([4, 16, 32]), scale=st.floats(1e-2, 1e3),
    shift=st.floats(-50, 50), seed=st.integers(0, 9999),
)  # fmt: skip
def test_codes_are_within_half_a_step(bits: int, group: int, scale: float, shift: float, seed: int) -> None:
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(seed)) * scale + shift
    form = SlotFormat(bits, group=group)
    fields = form.pack("key", x)
    assert fields["key"].dtype == torch.uint8
    assert fields["key"].numel() == x.numel() * bits // 8  # two int4 codes share a byte
    back = form.unpack("key", fields, torch.float32)
    groups = x.unflatten(-1, (-1, group))
    span = groups.amax(-1) - groups.amin(-1)
    # half a step, and the float16 rounding of minimum and step
    allowed = span / (2**bits - 1) * 0.5 + (groups.amin(-1).abs() + span) * 2e-3 + 1e-4
    assert ((back - x).abs().unflatten(-1, (-1, group)) <= allowed[..., None]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_what_was_unpacked_changes_nothing(bits: int) -> None:
    form = SlotFormat(bits, group=32)
    once = form.unpack("x", form.pack("x", torch.randn(50, 64)), torch.float32)
    twice = form.unpack("x", form.pack("x", once), torch.float32)
    torch.testing.assert_close(once, twice, rtol=0, atol=3e-3)


def test_int4_nibbles_are_where_they_should_be() -> None:
    x = torch.arange(16.0).roll(3)[None]
    form = SlotFormat(4, group=16)
    fields = form.pack("x", x)
    expected = [int(x[0, i]) + 16 * int(x[0, i + 1]) for i in range(0, 16, 2)]
    assert fields["x"][0].tolist() == expected
    assert torch.equal(form.unpack("x", fields, torch.float32), x)


def test_constant_groups_survive() -> None:
    x = torch.full((3, 8), 0.75)
    form = SlotFormat(8, group=8)
    torch.testing.assert_close(form.unpack("x", form.pack("x", x), torch.float32), x)


@given(st.lists(st.tuples(st.integers(0, 2**18 - 1), st.integers(0, 127), st.integers(0, 127)), min_size=1))
def test_positions_survive_and_sort(triples: list[tuple[int, int, int]]) -> None:
    positions = torch.tensor(triples)
    packed = pack_positions(positions)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_positions(packed), positions)
    assert [triples[i] for i in packed.argsort(stable=True).tolist()] == sorted(triples)


def test_take_broadcasts_and_gathers() -> None:
    x = torch.randn(2, 3, 7, 4)
    index = torch.randint(7, (2, 3, 5))
    expected = x.gather(2, index[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(take(x, index), expected)
    shared = torch.randint(7, (1, 1, 5))
    assert torch.equal(take(x, shared), x[:, :, shared[0, 0]])
    meta = torch.arange(7)[None, None]
    assert torch.equal(take(meta, index), index)


def test_slots_cat_narrow_write() -> None:
    a = Slots({"key": torch.randn(1, 2, 4, 3), "position": torch.arange(4)[None, None]})
    both = Slots.cat(a, a.gather(torch.tensor([[[3, 1]]])))
    assert both.size == 6 and both["position"].flatten().tolist() == [0, 1, 2, 3, 3, 1]
    room = both.empty(8)
    room.write(2, both)
    assert torch.equal(room.narrow(2, 8)["key"], both["key"]) and not room["key"][:, :, :2].any()
    assert a.nbytes == 2 * 4 * 3 * 4 + 4 * 8
