"""One budget split over heads: who gets what, nothing lost at the seams, and what goes wrong said in a sentence."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar.cache import CachePolicy, HeadErrors, HeadwiseCache, TempCache, WindowCache
from fastar.compare.methods import identity_of

from .worlds import FLOAT, HEADS, LAYERS, TOKENS, bound, fill, random_chunk, views_equal

# layer 0: head 1 needs everything; layer 1: none needs much
UNEVEN = HeadErrors(
    frames=(4, 8, 24),
    errors=(((0.01, 0.0, 0.0), (0.9, 0.9, 0.0)), ((0.02, 0.01, 0.0), (0.02, 0.01, 0.0))),
)
INNER: dict[str, Any] = {
    "window": partial(WindowCache, **FLOAT),
    "tempcache": partial(TempCache, moment="diagonal", recent_share=0.2, **FLOAT),
}


def uneven(name: str = "window", frames: float = 24, **options: Any) -> HeadwiseCache:
    """float32 slots: 24 frames of budget hold about 10 frames a head."""
    return HeadwiseCache(policy=INNER[name], head_errors=UNEVEN, budget_frames=frames, **options)


def test_frames_go_where_they_lower_the_error_most() -> None:
    assert UNEVEN.allot(4) == [[4, 4], [4, 4]]
    assert UNEVEN.allot(9) == [[4, 24], [4, 4]]
    assert UNEVEN.allot(12) == [[8, 24], [8, 8]]
    assert UNEVEN.allot(100) == [[8, 24], [24, 24]]  # what lowers nothing is not bought


def test_a_head_is_local_if_a_window_that_was_measured_leaves_little() -> None:
    assert UNEVEN.is_local(0, 0, 4, 0.01) and not UNEVEN.is_local(0, 0, 4, 0.009)
    assert not UNEVEN.is_local(0, 1, 8, 0.5)
    assert not UNEVEN.is_local(0, 1, 24, 0.5)  # what lies beyond the longest window is not known


def test_shares_name_the_heads_that_need_the_past_most() -> None:
    shares = UNEVEN.shares()
    assert shares[0][1:] == (0, 1) and shares[0][0] == pytest.approx(0.9 / 0.95)
    assert sum(share for share, *_ in shares) == pytest.approx(1) and len(shares) == LAYERS * HEADS


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=6, max_size=6),
    st.floats(4, 64),
)
def test_an_allotment_keeps_to_its_frames(curves: list[list[float]], mean: float) -> None:
    errors = HeadErrors((4, 8, 32, 64), tuple(tuple(tuple(c) for c in curves[i : i + 3]) for i in (0, 3)))
    table = errors.allot(mean)
    assert [len(layer) for layer in table] == [3, 3]
    assert sum(map(sum, table)) <= 6 * mean + 1e-6


@pytest.mark.parametrize("name", INNER)
def test_bytes_reach_a_constant_just_below_the_budget(name: str) -> None:
    policy = bound(uneven(name))
    sizes = []
    for number in range(30):
        fill(policy, 1, start=number)
        assert policy.bytes_used() <= policy.capacity_bytes() <= policy.total_budget()
        sizes.append((policy.bytes_used(), policy.slots_used()))
    assert len(set(sizes[-8:])) == 1 and sizes[-1][0] == policy.capacity_bytes()
    spare = sum(group.policy.slot_bytes() for group in policy.groups)
    assert policy.total_budget() - policy.capacity_bytes() <= spare


def test_every_head_sees_its_own_window() -> None:
    policy = bound(uneven())
    history = fill(policy, 16)
    k, v = (torch.cat([getattr(chunk, name) for chunk in history], 2) for name in ("k", "v"))
    view = policy.view(0)
    assert view.log_count is not None
    live = view.log_count[0] > -torch.inf
    slots = live.sum(-1).tolist()
    assert slots[1] > 24 * TOKENS > 2 * slots[0] > 8 * TOKENS and view.k.shape[2] == slots[1]
    for head, size in enumerate(slots):
        assert torch.equal(view.k[:, head, :size], k[:, head, -size:])
        assert torch.equal(view.v[:, head, :size], v[:, head, -size:])
        assert (view.log_count[:, head, :size] == 0).all()
    held = [group.policy.slots_used() * len(group.heads) for group in policy.groups]
    assert policy.slots_used() == -(-sum(held) // (LAYERS * HEADS))


def test_local_heads_get_the_local_policy() -> None:
    policy = bound(uneven("tempcache", local_policy=INNER["window"], local_error=0.5, frames=24))
    kinds = {(group.layer, head): type(group.policy) for group in policy.groups for head in group.heads}
    assert [kinds.pop((0, 1)), *kinds.values()] == [TempCache, *3 * [WindowCache]]


def test_without_measurements_all_heads_get_the_same() -> None:
    even = bound(HeadwiseCache(policy=INNER["window"], budget_frames=24))
    plain = bound(WindowCache(budget_frames=24, **FLOAT))
    for policy in (even, plain):
        fill(policy, 12)
    assert all(views_equal(even.view(layer), plain.view(layer)) for layer in range(LAYERS))
    assert even.bytes_used() == plain.bytes_used()
    merging = HeadwiseCache(
        policy=INNER["tempcache"], local_policy=INNER["window"], local_error=1.0, budget_frames=24
    )
    assert {type(group.policy) for group in bound(merging).groups} == {TempCache}  # nobody is local


@pytest.mark.parametrize("name", INNER)
def test_saved_and_restored_continues_with_the_same_bits(name: str) -> None:
    through, first, second = (bound(uneven(name)) for _ in range(3))
    fill(through, 12)
    fill(first, 8)
    saved = first.state_dict()
    fill(first, 1, start=8)  # what is saved is a copy
    second.load_state_dict(saved)
    fill(second, 4, start=8)
    assert all(views_equal(through.view(layer), second.view(layer)) for layer in range(LAYERS))


def test_a_saved_cache_of_other_settings_is_refused_and_changes_nothing() -> None:
    policy, other = bound(uneven()), bound(uneven(frames=40))
    fill(policy, 16)
    fill(other, 16)
    before = policy.state_dict()
    with pytest.raises(ValueError, match=r"other settings|budget holds"):
        policy.load_state_dict(other.state_dict())
    assert same(before, policy.state_dict())


def test_a_commit_is_all_heads_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = bound(uneven())
    fill(policy, 8)
    before = policy.state_dict()

    def fails(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(policy.groups[-1].policy, "absorb", fails)
        with pytest.raises(RuntimeError):
            fill(policy, 1, start=8)
    assert same(before, policy.state_dict())
    policy.discard()
    fill(policy, 1, start=8)  # and it goes on


def test_frames_are_dropped_in_all_heads_or_none() -> None:
    policy, again = bound(uneven()), bound(uneven())
    fill(policy, 8)
    fill(again, 7)
    policy.drop_from(14)
    fill(policy, 1, start=7)
    fill(again, 1, start=7)
    assert all(views_equal(policy.view(layer), again.view(layer)) for layer in range(LAYERS))
    before = policy.state_dict()
    with pytest.raises(ValueError, match="cannot be rewritten"):
        policy.drop_from(8)  # the long head could, the short ones could not
    assert same(before, policy.state_dict())


def test_a_budget_too_small_for_a_chunk_in_every_head_says_so() -> None:
    with pytest.raises(ValueError, match=r"split over heads.*heads \[.*\] of layer"):
        bound(uneven(frames=6))
    policy = uneven(frames=6)
    with pytest.raises(ValueError):
        bound(policy)
    assert not policy.is_bound
    with pytest.raises(ValueError, match=r"split over heads"):
        bound(uneven("tempcache", frames=0.1))


def test_measurements_of_another_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers of 2 heads, but the backbone has 3 of 2"):
        bound(uneven(), layers=3)


def test_files_come_back_as_they_were_saved(tmp_path: Any) -> None:
    path = tmp_path / "head_errors.json"
    HeadErrors(UNEVEN.frames, UNEVEN.errors, "abc").save(path, made="today")
    assert HeadErrors.load(path) == HeadErrors(UNEVEN.frames, UNEVEN.errors, "abc")
    from_file = bound(HeadwiseCache(policy=INNER["window"], head_errors=str(path), budget_frames=24))
    assert from_file.capacity_bytes() == bound(uneven()).capacity_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"frames": [4, 2], "weights": null, "errors": [[[1, 2]]]}',
        '{"frames": [2, 4], "weights": null, "errors": [[[1]]]}',
        '{"frames": [2], "weights": null, "errors": []}',
        '{"frames": [2], "weights": null, "errors": [[[NaN]]]}',
    ],
)
def test_damaged_or_missing_files_say_so(tmp_path: Any, text: str) -> None:
    path = tmp_path / "head_errors.json"
    with pytest.raises(ValueError, match=r"experiments/calibrate.py checkpoint="):
        HeadErrors.load(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is damaged .*measure it again"):
        HeadErrors.load(path)


def test_a_run_is_known_by_what_the_file_says_not_by_its_place(tmp_path: Any) -> None:
    places = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, layer in zip(places, (0, 0, 1), strict=True):
        HeadErrors((1, 2), UNEVEN_PAIRS[layer:] + UNEVEN_PAIRS[:layer], "abc").save(path)
    nodes = [{"cache": {"head_errors": str(path)}, "engine": "auto"} for path in places]
    a, b, c = (identity_of(node, "abc") for node in nodes)
    assert a == b != c and a["engine"] == "auto"
    with pytest.raises(ValueError, match="measured on other weights"):
        identity_of(nodes[0], "def")
    assert identity_of({"cache": {"budget": 1}}, "def") == {"cache": {"budget": 1}}


UNEVEN_PAIRS = (((0.5, 0.1), (0.2, 0.0)), ((0.3, 0.1), (0.1, 0.0)))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two saved states are equal bit for bit."""
    equal = (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
    return a.keys() == b.keys() and all(equal)


def test_what_was_staged_before_a_restore_is_forgotten() -> None:
    policy: CachePolicy = bound(uneven())
    fill(policy, 3)
    saved = policy.state_dict()
    policy.stage(0, random_chunk(5, 6))
    policy.load_state_dict(saved)
    with pytest.raises(ValueError, match="missing"):
        policy.commit(6, 2)
