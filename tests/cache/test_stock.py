"""The published windows, counted in frames: what a pass reads of them, and where the sink's keys are turned to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastar.attention.context import PassContext, PassKind
from fastar.cache import StockWindow
from fastar.cache.lineage import DROPPED, Lineage

from .worlds import FLOAT, LAYERS, ROPE, TOKENS, bound, fill, views_equal

CHUNK = 2
ROLLING = {"sink_frames": 2, "move_sink": True, "sink_in_commits": False}


def window(attended: int, **options: Any) -> Any:
    return bound(StockWindow(attended_frames=attended, **FLOAT, **options), chunk_frames=CHUNK)


def reader(first: int, frames: int = CHUNK, kind: PassKind = PassKind.DENOISE) -> PassContext:
    return PassContext(kind, first, frames, (0.0,) * frames)


def frames_of(policy: Any, what: str = "positions") -> list[int]:
    found = getattr(policy.view(0), what)
    return [] if found is None else found[1, 1, ::TOKENS, 0].tolist()


@pytest.mark.parametrize(
    ("options", "own", "kind", "expected"),
    [
        ({}, 2, "denoise", [14, 15, 16, 17, 18, 19]),
        ({}, 2, "commit", [14, 15, 16, 17, 18, 19]),
        ({}, 6, "denoise", [18, 19]),
        ({}, 9, "denoise", []),
        ({"sink_frames": 2}, 2, "denoise", [0, 1, 16, 17, 18, 19]),
        ({"sink_frames": 3}, 2, "commit", [0, 1, 2, 17, 18, 19]),
        ({"sink_frames": 3}, 6, "denoise", [0, 1, 2]),
        (ROLLING, 4, "denoise", [16, 17, 18, 19]),
        (ROLLING, 10, "denoise", [18, 19]),
        (ROLLING, 2, "commit", [14, 15, 16, 17, 18, 19]),
    ],
)
def test_a_pass_reads_what_its_window_says(
    options: dict[str, Any], own: int, kind: str, expected: list[int]
) -> None:
    """Eight frames after twenty; in the first, with room for everything, it is everything."""
    policy = window(8, **options)
    fill(policy, 1)
    policy.enter(reader(2, 2, PassKind(kind)))
    assert frames_of(policy) == [0, 1]
    fill(policy, 9, start=1)
    policy.enter(reader(20, own, PassKind(kind)))
    assert frames_of(policy) == expected
    assert policy.bytes_used() == policy.capacity_bytes()


def test_views_are_read_afresh_only_if_they_may_differ() -> None:
    policy = window(8, **ROLLING)
    passes = [reader(4), reader(4), reader(4, 6), reader(4, 2, PassKind.COMMIT), reader(6), reader(6)]
    assert [policy.enter(context) for context in passes] == [True, False, True, True, True, False]
    plain = window(8, sink_frames=2)
    assert [plain.enter(context) for context in (reader(4), reader(4, 2, PassKind.COMMIT))] == [True, False]


def test_the_sink_is_turned_to_stand_before_the_window() -> None:
    """As if its raw keys had been roped there; what it is remains known by where its tokens come from."""
    policy, still = window(8, sink_frames=2, move_sink=True), window(8, sink_frames=2)
    lineages = [Lineage(), Lineage()]
    for each, lineage in zip((policy, still), lineages, strict=True):
        each.follow(lineage)
    first = fill(policy, 1)[0]
    fill(still, 1)
    for chunks in (3, 4, 7):
        made = policy.next_frame // CHUNK
        for each in (policy, still):
            fill(each, chunks - made, start=made)
            each.enter(reader(chunks * CHUNK))
        view, plain = policy.view(0), still.view(0)
        own = chunks * CHUNK
        assert frames_of(policy) == list(range(own - 6, own)) and frames_of(still)[:2] == [0, 1]
        places = torch.arange(own - 6, own - 4).repeat_interleave(TOKENS)
        positions = torch.cat([places[:, None], first.positions[:, 1:]], dim=1)
        sink = 2 * TOKENS
        torch.testing.assert_close(view.k[:, :, :sink], ROPE.rotate(first.k_raw, positions))
        assert torch.equal(view.k[:, :, sink:], plain.k[:, :, sink:]) and torch.equal(view.v, plain.v)
        assert (view.origins is None) == (own == 6), "with nothing in between it stays where it is"
        assert own == 6 or torch.equal(view.origins, plain.positions)
        found = [
            each.assignment(0, each_view) for each, each_view in zip(lineages, (view, plain), strict=True)
        ]
        assert torch.equal(*found) and int((found[0][0, 0] != DROPPED).sum()) == 6 * TOKENS


@pytest.mark.parametrize("options", [{}, {"sink_frames": 2}, ROLLING], ids=str)
@pytest.mark.parametrize("back", [0, 1, 6, 12, 19])
def test_any_frames_can_be_made_again(options: dict[str, Any], back: int) -> None:
    policy = window(8, **options)
    fill(policy, 10)
    kept = {frame for frame in policy_frames(policy) if frame < back}
    policy.drop_from(back)
    assert policy_frames(policy) == sorted(kept) and policy.next_frame == back
    for number in range(back, 24, 2):
        fill(policy, 1, first=back, start=(number - back) // 2)
    policy.enter(reader(policy.next_frame))
    end, sink = policy.next_frame, options.get("sink_frames", 0)
    assert frames_of(policy)[sink:] == list(range(end - 6 + sink, end))
    again = window(8, **options)
    again.load_state_dict(policy.state_dict())
    again.enter(reader(end))
    assert all(views_equal(again.view(layer), policy.view(layer)) for layer in range(LAYERS))


def policy_frames(policy: Any) -> list[int]:
    """Frames that are kept, whatever a pass reads of them."""
    kept = super(StockWindow, policy).view(0)
    return [] if kept.positions is None else kept.positions[0, 0, ::TOKENS, 0].tolist()


def test_windows_that_make_no_sense_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="attended_frames above it, got 3 and 3"):
        StockWindow(attended_frames=3, sink_frames=3)
    with pytest.raises(ValueError, match="sink_frames >= 0"):
        StockWindow(sink_frames=-1)
    with pytest.raises(
        ValueError, match="a window of 3 frames is shorter than a chunk of 4: raise attended_frames"
    ):
        bound(StockWindow(attended_frames=3), chunk_frames=4)
